"""Vision Remember: identity, places, features, caches, gradients, files."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    MissingFileError,
    WeightsError,
)
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.retention.fast_v import FastV
from mmforget.retention.region_reader import region_index
from mmforget.retention.remembering_model import RememberingLM, load_remembering
from mmforget.retention.token_pooling import PooledTokens
from mmforget.retention.vision_remember import VisionRemember
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)


def batch() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [], [two, three]],
        "question": ["what is this ?", "where is anna ?", "what are this there ?"],
        "answer": ["anna", "rome", "red blue"],
        "label": torch.tensor([0, 1, 2]),
        "id": torch.arange(3),
        "weight": torch.ones(3),
    }


def opened(model: RememberingLM, value: float = 0.7) -> RememberingLM:
    for gate in model.remember.gates.values():
        gate.data.fill_(value)
    return model


def hooks(network: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request: Any) -> RememberingLM:
    return RememberingLM(*tiny_multimodal(request.param), max_new_tokens=4).eval()


@pytest.fixture(scope="module")
def shared() -> RememberingLM:
    return RememberingLM(*tiny_multimodal("llava"), max_new_tokens=4).eval()


@pytest.fixture
def model(shared: RememberingLM) -> RememberingLM:
    return copy.deepcopy(shared)


@torch.no_grad()
def test_closed_gates_change_nothing_and_open_ones_only_rows_with_pictures(
    any_kind: RememberingLM,
) -> None:
    model, given = any_kind, batch()
    plain = MultimodalLM(model.network, model.processor, max_new_tokens=4).eval()
    keys = list(model.network.state_dict())
    base = plain.answer_logits(given)
    plain.answer(given["images"], given["question"])
    own = hooks(model.network)  # transformers adds some of its own when it first runs
    opened(model, 0.0)
    assert torch.equal(base.logits, model.answer_logits(given).logits)
    assert torch.equal(plain.features(given), model.features(given))
    assert model.answer(given["images"], given["question"]) == plain.answer(
        given["images"], given["question"]
    )
    opened(model)
    found = model.answer_logits(given)
    assert torch.equal(base.logits[1], found.logits[1])  # text only
    learnt = found.labels != IGNORED
    for row in (0, 2):
        change = (base.logits[row] - found.logits[row])[learnt[row]].abs().amax(-1)
        assert (change > 1e-4).all()
    texts = [[], []], ["where is anna ?", "who is this ?"]
    assert model.answer(*texts) == plain.answer(*texts)
    assert hooks(model.network) == own
    assert list(model.network.state_dict()) == keys
    assert torch.equal(base.logits, plain.answer_logits(given).logits)


@torch.no_grad()
def test_every_picture_reads_its_own_features(any_kind: RememberingLM) -> None:
    model, given = opened(any_kind), batch()
    seen: list[tuple[Tensor, ...]] = []
    layer = str(model.remember.after[0])
    spy = model.remember.readers[layer].register_forward_pre_hook(
        lambda _module, args: seen.append(args[:3])
    )
    try:
        model.loss(given)
        model.answer(given["images"], given["question"])
    finally:
        spy.remove()
    assert len(seen) == 2  # one pass for the loss; at decoding steps nothing happens
    features = model.family.encode_images(model.network, model.inputs(given), model.remember.levels)
    wanted = torch.cat([torch.stack(features.levels[n]) for n in model.remember.levels], dim=-1)
    grid, raw = features.grid[0], features.raw_grid[0]
    assert grid is not None
    for _, found, index in seen:
        assert torch.allclose(found, wanted, atol=1e-6)
        assert torch.equal(index, region_index(grid, raw, model.remember.window))
    assert model.remember.window == (raw[0] // grid[0] if raw != grid else 3)
    flat = wanted.flatten(1)
    assert (flat[0] - flat[1]).abs().max() > 0.1 < (flat[1] - flat[2]).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_only_the_places_of_visual_tokens_change(model: RememberingLM, padding: Any) -> None:
    inputs = model.inputs(batch(), padding=padding, answers=False)
    visual = model.family.visual_mask(model.network, inputs["input_ids"])
    states: list[Tensor] = []
    layer = model.family.layers(model.network)[0]

    def run(value: float) -> Tensor:
        opened(model, value)
        with model.remembering():
            handle = layer.register_forward_hook(lambda _m, _a, output: states.append(output))
            model.network(**inputs, use_cache=False)
            handle.remove()
        return states[-1]

    before, after = run(0.0), run(0.5)
    assert torch.equal(before[~visual], after[~visual])
    features = model.family.encode_images(model.network, inputs, [1])
    reader = model.remember.readers["0"]
    index = region_index((4, 4), (4, 4), 3)
    own = before[visual].unflatten(0, (3, 16))
    wanted = own + torch.tensor(0.5).tanh() * reader(own, torch.stack(features.levels[1]), index)
    assert torch.allclose(after[visual], wanted.flatten(0, 1), atol=1e-6)


@torch.no_grad()
def test_padding_does_not_matter(any_kind: RememberingLM) -> None:
    model, given = opened(any_kind), batch()
    rows = []
    for padding in ("left", "right"):
        inputs = model.inputs(given, padding=padding)  # type: ignore[arg-type]
        labels = inputs.pop("labels")
        with model.remembering():
            logits = model.network(**inputs, use_cache=False).logits
        rows.append([one[:-1][own[1:] != IGNORED] for one, own in zip(logits, labels, strict=True)])
    for left, right in zip(*rows, strict=True):
        assert torch.allclose(left, right, atol=2e-4)


@torch.no_grad()
def test_generation_equals_reading_everything_anew(any_kind: RememberingLM) -> None:
    model, shown = opened(any_kind), [tiny_pictures(1)]
    answer = model.answer(shown, ["what is this ?"], 4, suppress_tokens=[*model.end_ids])
    inputs = model.inputs(
        {"images": shown, "question": ["what is this ?"]}, padding="left", answers=False
    )
    said: list[int] = []
    for _ in range(4):
        with model.remembering():
            logits = model.network(**inputs, use_cache=False).logits[0, -1]
        logits[[*model.end_ids]] = -torch.inf
        said.append(int(logits.argmax()))
        for key, value in (
            ("input_ids", said[-1]),
            ("attention_mask", 1),
            ("mm_token_type_ids", 0),
        ):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], dim=1)
    assert answer == [model.processor.tokenizer.decode(said, skip_special_tokens=True).strip()]


@torch.no_grad()
def test_every_beam_sees_its_own_pictures(any_kind: RememberingLM) -> None:
    model, given = opened(any_kind, 2.0), batch()
    if "mm_encoder_outputs" not in inspect.signature(model.network.forward).parameters:
        pytest.skip("earlier releases of transformers mix up the pictures of beams themselves")
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    layer, seen = str(model.remember.after[0]), []
    spy = model.remember.readers[layer].register_forward_pre_hook(
        lambda _module, args: seen.append(args[1])
    )
    together = model.answer(given["images"], given["question"], 3, **options)
    spy.remove()
    levels = model.remember.levels
    features = model.family.encode_images(model.network, model.inputs(given), levels).levels
    wanted = torch.cat([torch.stack(features[n]) for n in levels], dim=-1)
    assert torch.allclose(seen[0], wanted[[0, 0, 0, 1, 2, 1, 2, 1, 2]], atol=1e-6)
    alone = [
        answer
        for shown, asked in zip(given["images"], given["question"], strict=True)
        for answer in model.answer([shown], [asked], 3, **options)
    ]
    assert together == alone and len(together) == 6


def test_gradients(model: RememberingLM) -> None:
    weight = model.remember.readers["0"].key[0].weight
    model.loss(batch()).mean().backward()
    gates = model.remember.gates.values()
    assert all(gate.grad is not None and gate.grad != 0 for gate in gates)
    assert weight.grad is not None and not weight.grad.any()  # behind a closed gate
    assert all(p.grad is None for p in model.family.vision_blocks(model.network).parameters())
    assert any(p.grad is not None for p in model.family.projector_of(model.network).parameters())
    model.zero_grad()
    opened(model)
    model.loss(batch()).mean().backward()
    assert weight.grad.any()
    model.zero_grad()
    words = {key: value[1:2] for key, value in batch().items()}
    model.network.lm_head.requires_grad_(True)
    model.loss(words).mean().backward()  # no picture: nothing of the modules is used
    assert all(p.grad is None for p in model.remember.parameters())
    assert model.network.lm_head.weight.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_finds_the_pictures_of_its_own_pass(
    model: RememberingLM, reentrant: bool
) -> None:
    opened(model).train()
    first = batch()
    second = first | {"images": [first["images"][0], [], first["images"][2][::-1]]}

    def gradient() -> Tensor:
        model.zero_grad()
        with model.remembering():  # two passes before one backward
            (model.loss(first).mean() + 2 * model.loss(second).mean()).backward()
        return model.remember.readers["0"].key[0].weight.grad.clone()

    plain = gradient()
    model.network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.allclose(gradient(), plain, atol=1e-6)
    assert plain.abs().max() > 1e-4


@torch.no_grad()
def test_pruning_comes_after_the_last_layer(model: RememberingLM) -> None:
    opened(model)
    given, losses, answers = batch(), [], []
    for mode in ("drop", "mask"):
        with FastV(keep_tokens=5, layer=2, mode=mode).on(model):  # type: ignore[arg-type]
            losses.append(model.loss(given))
            answers.append(model.answer(given["images"], given["question"]))
    assert torch.allclose(*losses, atol=1e-5) and answers[0] == answers[1]
    assert not torch.allclose(losses[0], model.loss(given), atol=1e-3)
    late = pytest.raises(ConfigurationError, match="prune after its last layer only")
    with late, FastV(keep_tokens=5, layer=1).on(model):
        model.loss(given)
    before = pytest.raises(ConfigurationError, match="spare no tokens before the layers")
    with before, PooledTokens(keep_tokens=4).on(model):
        model.loss(given)


@torch.no_grad()
def test_a_network_with_adapters(model: RememberingLM) -> None:
    from peft import LoraConfig, get_peft_model

    opened(model)
    inputs = model.inputs(batch(), answers=False)
    with model.remembering():
        wanted = model.network(**inputs, use_cache=False).logits
    config = LoraConfig(target_modules=r".*language_model.*q_proj")  # starts without effect
    wrapped = get_peft_model(copy.deepcopy(model.network), config)
    plain = wrapped(**inputs, use_cache=False).logits
    with model.remember.attached(wrapped), model.remember.attached(wrapped):  # counts once
        found = wrapped(**inputs, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-6) and not torch.allclose(found, plain, atol=1e-3)


@torch.no_grad()
def test_a_pooled_projector_gets_back_what_it_lost() -> None:
    """Two pictures whose pooled features are alike, and whose features are not."""
    network, processor = tiny_multimodal("llava")
    projector = network.model.multi_modal_projector

    def pool(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)

    projector.register_forward_hook(pool)
    processor.patch_size *= 2
    model = opened(RememberingLM(network, processor).eval())
    for reader in model.remember.readers.values():
        torch.nn.init.normal_(reader.place)  # at first, the order within a region is not read
    assert model.remember.settings["window"] == 2
    inputs = model.inputs(batch())
    assert int(model.family.visual_mask(network, inputs["input_ids"]).sum()) == 3 * 4
    blocks = model.family.vision_blocks(network)

    def swapped(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 1:3] = output[:, 1:3].flip(1)  # the first two patches, of one region
        return output

    plain = MultimodalLM(network, processor).eval()
    values = []
    for module in (plain, model):
        before = module.loss(batch())
        handle = blocks[1].register_forward_hook(swapped)
        values.append((module.loss(batch()) - before).abs())
        handle.remove()
    assert values[0].max() < 1e-5 < 1e-4 < values[1][[0, 2]].min()


@torch.no_grad()
def test_the_answer_does_not_guide_itself() -> None:
    model = opened(RememberingLM(*tiny_multimodal("llava"), text_guided=True).eval())
    given = batch()
    one = model.instances(given).logits
    other = model.instances(given | {"answer": ["rome", "rome", "red digit"]}).logits
    assert torch.allclose(one, other, atol=1e-5)
    asked = model.instances(given | {"question": ["who is this ?"] * 3}).logits
    assert not torch.allclose(one[0], asked[0], atol=1e-3)
    unknown = pytest.raises(ConfigurationError, match="must know which tokens are the question")
    with unknown, model.remembering():
        model.network(**model.inputs(given, answers=False), use_cache=False)
    first = model.answer(given["images"], given["question"], 1)
    scores = model.instances(given).logits.argmax(-1)
    decode = model.processor.tokenizer.decode
    assert first == [decode([t], skip_special_tokens=True) for t in scores.tolist()]
    opened(model, 0.0)
    plain = MultimodalLM(model.network, model.processor).eval()
    assert torch.equal(plain.loss(given), model.loss(given))


def test_files(model: RememberingLM, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    opened(model)
    model.save_native(tmp_path)
    network, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert network.state_dict().keys() == model.network.state_dict().keys()
    loaded = load_remembering(tmp_path)
    own = model.loss(batch())
    assert torch.allclose(loaded.loss(batch()), own, atol=1e-6)
    assert (MultimodalLM(tmp_path).eval().loss(batch()) - own)[[0, 2]].abs().min() > 1e-4
    settings = tmp_path / "vision_remember.json"
    other = json.loads(settings.read_text())
    settings.write_text(json.dumps(other | {"inner": 12}))
    with pytest.raises(WeightsError, match="does not fit"):
        load_remembering(tmp_path)
    settings.write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        load_remembering(tmp_path)
    settings.unlink()
    with pytest.raises(MissingFileError, match=r"has no vision_remember\.json"):
        load_remembering(tmp_path)


def test_training_leaves_the_rest_alone(
    model: RememberingLM, quiet_trainer: Callable[..., Trainer]
) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.lr = 1e-2
    quiet_trainer(max_epochs=2).fit(model, DataLoader([batch()], batch_size=None))
    for name, parameter in model.named_parameters():
        part = model.family.part(name.removeprefix("network."))
        trained = name.startswith("remember.") or part == "projector"
        # biases of keys have no effect, and the saliency's only level does not either
        assert trained or torch.equal(before[name], parameter), name
    assert all(gate != 0 for gate in model.remember.gates.values())
    new = model.fresh(1)
    assert all(gate == 0 for gate in new.remember.gates.values())
    weights = [m.remember.readers["0"].out.weight for m in (new, model)]
    assert not torch.equal(*weights)
    assert torch.equal(
        new.remember.readers["0"].out.weight, model.fresh(1).remember.readers["0"].out.weight
    )


def test_the_recipe(model: RememberingLM) -> None:
    model.warmup = 0.5
    optimizer, schedule = model.optimizers_for(4)
    rates = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert rates.keys() == {id(p) for p in trained}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gate = name.startswith("remember.gates.")
            assert rates[id(parameter)] == pytest.approx(model.lr * (20 if gate else 1))
            decay = model.weight_decay if parameter.ndim > 1 else 0.0
            assert decays[id(parameter)] == decay
    first = [group["lr"] / group["initial_lr"] for group in optimizer.param_groups]
    assert first == pytest.approx([1 / 3] * len(first))  # of two steps of warm-up
    with pytest.raises(ConfigurationError, match="`gate_rate` is 0"):
        RememberingLM(model.network, model.processor, gate_rate=0)
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_shared_weights_keep_their_own_gates() -> None:
    modules = VisionRemember([1, 0], [1], 32, 24, 8, share=True)
    assert list(modules.readers) == ["all"] and list(modules.gates) == ["0", "1"]
    assert modules.after == (0, 1)


def test_bad_input(model: RememberingLM) -> None:
    given = batch()
    network, processor = model.network, model.processor
    for settings, message in (
        ({"after": [3]}, r"`after` is \[3\], but there are 3 layers"),
        ({"levels": [0, 0]}, "`levels` is"),
        ({"inner": 6}, "`inner` is 6"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            RememberingLM(network, processor, **settings)
    inputs = model.inputs(given)
    labels = inputs.pop("labels")
    network(**inputs)
    own = hooks(network)
    with model.remembering():
        with pytest.raises(ConfigurationError, match="needs `input_ids`"):
            network(inputs_embeds=torch.zeros(1, 3, 32))
        with torch.no_grad():
            features = network.get_image_features(inputs["pixel_values"])
        foreign = {"image": copy.deepcopy(features)}
        rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
        with pytest.raises(ConfigurationError, match="come from elsewhere"):
            network(**rest, mm_encoder_outputs=foreign)
        layer = model.family.layers(network)[0]
        cut = layer.register_forward_hook(lambda _m, _a, output: output[:, 1:], prepend=True)
        with pytest.raises(ConfigurationError, match="decoder layer 0 does not see the tokens"):
            network(**inputs)
        cut.remove()
    assert hooks(network) == own and labels.shape == inputs["input_ids"].shape
    projector = network.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda _m, _a, output: output[:, :15])
    with pytest.raises(CapabilityError, match="form no grid"):
        RememberingLM(network, processor)
    handle.remove()
