"""Dropping visual tokens between decoder layers: exactness on every family, caches, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError, DataError, DivergenceError
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.fast_v import AttentionScores, FastV
from mmforget.retention.token_baselines import GridScores, RandomScores
from mmforget.retention.token_pruning import TokenPruner
from mmforget.retention.token_reduction import PictureTokens
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)


@cache
def model_of(kind: TinyMultimodalKind) -> MultimodalLM:
    """Shared: no test may change it."""
    return MultimodalLM(*tiny_multimodal(kind)).eval()


def batch() -> dict[str, Any]:
    """One picture, two pictures, none; three lengths."""
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [two, three], []],
        "question": ["what is this ?", "who is the person shown in it ?", "where is anna ?"],
        "answer": ["anna", "clara please", "rome"],
    }


def encoded(
    model: MultimodalLM, padding: str = "left", rows: slice = slice(None)
) -> dict[str, Any]:
    some = {key: value[rows] for key, value in batch().items()}
    found = model.inputs(some, padding=padding, answers=False)  # type: ignore[arg-type]
    return model.family.model_inputs(found)


def logits(network: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(**inputs, **options).logits
    return found


def generated(network: Any, inputs: dict[str, Any], tokens: int = 5, **options: Any) -> Any:
    with torch.no_grad():
        return network.generate(
            **inputs,
            **{"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | options,
            output_logits=True,
            return_dict_in_generate=True,
        )


def cache_lengths(output: Any) -> list[int]:
    held = output.cache if "cache" in output else output.past_key_values
    return [layer.keys.shape[2] for layer in held.layers]


@contextmanager
def attention(network: Any, kernel: str) -> Iterator[None]:
    network.set_attn_implementation({"text_config": kernel})
    try:
        yield
    finally:
        network.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [16, 5, 1, 0])
def test_dropped_equals_masked(kind: TinyMultimodalKind, keep: int) -> None:
    """Cached generation from left padding; budgets are ragged, since pictures differ in number."""
    model = model_of(kind)
    inputs = encoded(model)
    length, found = inputs["input_ids"].shape[1], {}
    for mode in ("drop", "mask"):
        pruner = FastV(keep_tokens=keep, layer=2, mode=mode)  # type: ignore[arg-type]
        with pruner.on(model.network):
            found[mode] = generated(model.network, inputs)
    assert pruner.kept is not None
    assert pruner.kept.counts == [min(keep, 16), 2 * min(keep, 16), None]
    torch.testing.assert_close(
        torch.stack(found["drop"].logits), torch.stack(found["mask"].logits), rtol=0, atol=1e-5
    )
    assert torch.equal(found["drop"].sequences, found["mask"].sequences)
    assert cache_lengths(found["mask"]) == [length + 4] * 3
    real = int(inputs["attention_mask"][1].sum()) - 32 + 2 * keep  # the longest row when pruned
    assert cache_lengths(found["drop"])[:2] == [length + 4] * 2
    assert cache_lengths(found["drop"])[2] == (length + 4 if keep == 16 else real + 4)
    if keep == 16:
        plain = generated(model.network, inputs)
        assert torch.equal(torch.stack(found["drop"].logits), torch.stack(plain.logits))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_equals_masked_in_one_pass(kind: TinyMultimodalKind) -> None:
    """Right padding, all positions, and the loss of transformers itself."""
    model = model_of(kind)
    inputs = model.inputs(batch(), padding="right")
    outputs = []
    for mode in ("drop", "mask"):
        pruner = FastV(keep_ratio=0.25, layer=1, mode=mode)  # type: ignore[arg-type]
        with pruner.on(model.network), torch.no_grad():
            outputs.append(model.network(**pruner.reduced(model.network, inputs)))
    assert outputs[0].logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=0, atol=1e-5)
    plain = model.network(**inputs)
    assert (plain.loss - outputs[0].loss).abs() > 1e-4


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_equals_layers_run_by_hand_on_what_is_left(kind: TinyMultimodalKind) -> None:
    model = model_of(kind)
    network, family = model.network, model.family
    inputs = encoded(model, rows=slice(0, 1))
    seen: dict[str, Any] = {}

    def keep_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(hidden=args[0], turns=kwargs["position_embeddings"])

    handle = family.layers(network)[2].register_forward_pre_hook(keep_input, with_kwargs=True)
    plain = logits(network, inputs)
    handle.remove()
    with FastV(keep_tokens=5, layer=2).on(network) as pruner:
        pruned = logits(network, inputs)
    assert pruner.kept is not None and pruner.kept.places[0] is not None
    visual = family.visual_mask(network, inputs["input_ids"])[0]
    stay = ~visual
    stay[visual.nonzero()[pruner.kept.places[0][0], 0]] = True
    states = seen["hidden"][:, stay]
    turns = tuple(part[:, stay] for part in seen["turns"])
    with torch.no_grad():
        states = family.layers(network)[2](states, attention_mask=None, position_embeddings=turns)
        expected = model.head(family.language_model(network).norm(states))
    torch.testing.assert_close(pruned[:, stay], expected, rtol=0, atol=1e-5)
    assert (pruned[:, -1] - plain[:, -1]).abs().max() > 1e-3
    dropped = (~stay).nonzero()[0, 0]
    assert torch.equal(pruned[0, dropped], pruned[0, dropped - 1])  # its length is given back


def test_scores_are_those_of_the_eager_kernel() -> None:
    model = model_of("llava")
    inputs = encoded(model, rows=slice(0, 1))
    with FastV(keep_tokens=5, layer=2).on(model.network) as pruner:
        logits(model.network, inputs)
    with attention(model.network, "eager"), torch.no_grad():
        weights = model.network(**inputs, output_attentions=True).attentions[1]
    visual = model.family.visual_mask(model.network, inputs["input_ids"])[0]
    received = weights[0, :, -1].mean(dim=0)[visual]
    assert pruner.kept is not None and pruner.kept.places[0] is not None
    assert pruner.kept.places[0][0].tolist() == received.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_scores_of_all_text(heads: Any) -> None:
    """In a padded batch, against the eager kernel's weights."""
    model = model_of("smolvlm")
    inputs = encoded(model)
    scores: list[Tensor] = []

    class Listening(AttentionScores):
        def __call__(self, tokens: PictureTokens) -> Tensor:
            scores.append(super().__call__(tokens))
            return scores[-1]

    with TokenPruner(Listening("text", heads), keep_tokens=3, layer=1).on(model.network):
        logits(model.network, inputs)
    with attention(model.network, "eager"), torch.no_grad():
        weights = model.network(**inputs, output_attentions=True).attentions[0]
    visual = model.family.visual_mask(model.network, inputs["input_ids"])
    reduced = weights.mean(dim=1) if heads == "mean" else weights.amax(dim=1)
    text = inputs["attention_mask"][0].bool() & ~visual[0]
    expected = reduced[0, text].mean(dim=0)[visual[0]]
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_kernels_agree(kernel: str) -> None:
    model = model_of("internvl")
    inputs = encoded(model)
    with FastV(keep_tokens=3, layer=1).on(model.network):
        expected = generated(model.network, inputs)
    with attention(model.network, kernel), FastV(keep_tokens=3, layer=1).on(model.network):
        found = generated(model.network, inputs)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_beams_of_ragged_rows(kind: TinyMultimodalKind) -> None:
    model = model_of(kind)
    inputs = encoded(model)
    found = []
    for mode in ("drop", "mask"):
        with FastV(keep_tokens=4, layer=1, mode=mode).on(model.network) as pruner:  # type: ignore[arg-type]
            found.append(generated(model.network, inputs, num_beams=3, output_scores=True))
        assert pruner.kept is not None
        assert pruner.kept.counts == [4] * 3 + [8] * 3 + [None] * 3
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(
        found[0].sequences_scores, found[1].sequences_scores, rtol=0, atol=1e-5
    )


def test_through_adapters_and_back() -> None:
    """Hooks reach the network inside of peft; afterwards all is as it was, names included."""
    from peft import LoraConfig, get_peft_model

    model = MultimodalLM(*tiny_multimodal("llava")).eval()
    inputs = encoded(model)
    with FastV(keep_tokens=3, layer=1).on(model.network):
        plain = logits(model.network, inputs)
    targets = r".*language_model.*\.[qv]_proj"
    network = get_peft_model(model.network, LoraConfig(r=2, target_modules=targets)).eval()
    before = logits(network, inputs)
    names = list(network.state_dict())
    with FastV(keep_tokens=3, layer=1).on(network):
        assert list(network.state_dict()) == names
        torch.testing.assert_close(logits(network, inputs), plain, rtol=0, atol=1e-6)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        changed = logits(network, inputs)
    assert (changed - plain).abs().max() > 1e-3
    network.merge_adapter()
    with FastV(keep_tokens=3, layer=1).on(network.get_base_model()):
        merged = logits(network.get_base_model(), inputs)
    torch.testing.assert_close(merged, changed, rtol=0, atol=1e-4)
    network.unmerge_adapter()
    with network.disable_adapter():
        torch.testing.assert_close(logits(network, inputs), before, rtol=0, atol=1e-5)


def hooks(network: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_nothing_is_left_behind_after_an_error() -> None:
    model = model_of("qwen2_5_vl")
    inputs = encoded(model)
    plain, number = logits(model.network, inputs), hooks(model.network)

    def broken(tokens: PictureTokens) -> Tensor:
        raise RuntimeError("scorer")

    with (
        pytest.raises(RuntimeError, match="scorer"),
        TokenPruner(broken, keep_tokens=2).on(model.network),
    ):
        assert hooks(model.network) > number
        logits(model.network, inputs)
    assert hooks(model.network) == number
    assert torch.equal(logits(model.network, inputs), plain)
    with FastV(keep_tokens=2).on(model.network):  # and it can be used again
        assert not torch.equal(logits(model.network, inputs), plain)


def test_what_keeps_all_changes_no_bit() -> None:
    model = model_of("idefics3")
    inputs, text = encoded(model), encoded(model, rows=slice(2, 3))
    plain = logits(model.network, inputs)
    for budget in ({"keep_tokens": 16}, {"keep_tokens": 99}, {"keep_ratio": 1.0}):
        with FastV(**budget).on(model.network) as pruner:  # type: ignore[arg-type]
            assert torch.equal(logits(model.network, inputs), plain)
            assert pruner.kept is not None and pruner.kept.ratio == 1.0
    expected = generated(model.network, text)
    with FastV(keep_tokens=0).on(model.network) as pruner:
        found = generated(model.network, text)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert pruner.kept is None  # no batch with pictures came by


def test_a_text_among_pictures_is_not_touched() -> None:
    model = model_of("llava")
    inputs = encoded(model)
    plain = logits(model.network, inputs)
    with FastV(keep_tokens=0).on(model.network):
        found = logits(model.network, inputs)
    torch.testing.assert_close(found[2, -4:], plain[2, -4:], rtol=0, atol=1e-5)
    assert (found[0, -1] - plain[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_budgets_of_each_picture_and_of_rows(kind: TinyMultimodalKind) -> None:
    """LLaVA's template puts pictures side by side; they count one by one all the same."""
    model = model_of(kind)
    inputs = encoded(model)
    outputs = []
    for mode in ("drop", "mask"):
        pruner = FastV(keep_tokens=[2, 5, 0], layer=1, mode=mode)  # type: ignore[arg-type]
        with pruner.on(model.network):
            outputs.append(logits(model.network, inputs))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert pruner.kept is not None
    assert [None if row is None else [len(one) for one in row] for row in pruner.kept.places] == [
        [2],
        [5, 0],
        None,
    ]
    with FastV(keep_tokens=7, scope="row", layer=1).on(model.network) as pruner:
        logits(model.network, inputs)
    assert pruner.kept is not None and pruner.kept.counts == [7, 7, None]
    assert pruner.kept.given == [[16], [16, 16], None]
    with (
        pytest.raises(DataError, match="budgets for 2 pictures, but the batch has 3"),
        FastV(keep_tokens=[2, 5]).on(model.network),
    ):
        logits(model.network, inputs)


def test_scorers_see_grids_pictures_and_their_own_states() -> None:
    model = model_of("qwen2_vl")
    tall = torch.zeros(3, 32, 16, dtype=torch.uint8)
    seen: list[PictureTokens] = []

    def first(tokens: PictureTokens) -> Tensor:
        seen.append(tokens)
        return -torch.arange(len(tokens.features)).float()

    picture = tiny_pictures(1)[0]
    with TokenPruner(first, keep_tokens=2, layer=1).on(model) as pruner:
        model.answer([[picture, tall], [picture]], ["what ?", "who is it ?"], max_new_tokens=2)
    assert [(one.row, one.number, one.grid) for one in seen] == [
        (0, 0, (4, 4)),
        (0, 1, (4, 2)),
        (1, 0, (4, 4)),
    ]
    assert seen[1].image is tall and seen[1].keep == 2 and seen[1].attention is None
    assert seen[1].features.shape == (8, 32)
    assert pruner.kept is not None and pruner.kept.places[0] is not None
    assert [one.tolist() for one in pruner.kept.places[0]] == [[0, 1], [0, 1]]


def test_the_answer_does_not_choose() -> None:
    """With labels, the last token of the prompt gives the scores, whatever follows it."""
    model = model_of("llava")
    kept = []
    with FastV(keep_tokens=4, layer=1).on(model) as pruner:
        for answer in ("anna", "what which who where how is"):
            losses = model.loss({**batch(), "answer": [answer, answer, answer]})
            assert torch.isfinite(losses).all()
            assert pruner.kept is not None and pruner.kept.places[1] is not None
            kept.append([one.tolist() for one in pruner.kept.places[1]])
        model.answer(batch()["images"], batch()["question"], max_new_tokens=1)
        assert pruner.kept.places[1] is not None
        kept.append([one.tolist() for one in pruner.kept.places[1]])
    assert kept[0] == kept[1] == kept[2]


def test_gradients_with_checkpointing() -> None:
    """Two forward passes before the backward pass; each recomputes its own selection."""
    model = MultimodalLM(*tiny_multimodal("llava")).train()
    number = 0

    def counting(tokens: PictureTokens) -> Tensor:
        nonlocal number
        number += 1
        return tokens.features[:, 0]

    def gradients() -> list[Tensor]:
        nonlocal number
        model.zero_grad()
        number = 0
        with TokenPruner(counting, keep_tokens=4, layer=1).on(model):
            total = sum(model.loss({**batch(), "question": [q] * 3}).sum() for q in ("who", "what"))
            assert isinstance(total, Tensor)
            total.backward()
        assert number == 6
        return [p.grad.clone() for p in model.network.parameters() if p.grad is not None]

    plain = gradients()
    model.network.gradient_checkpointing_enable()
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_second_prompt_on_the_cache(kind: TinyMultimodalKind) -> None:
    """Old tokens stay as they were pruned, pictures of the new prompt are pruned too."""
    model = model_of(kind)
    turns = [encoded(model, rows=slice(0, 2)), encoded(model, rows=slice(0, 2))]
    turns[1]["pixel_values"] = turns[1]["pixel_values"].flip(0)
    mask = torch.cat([turn["attention_mask"] for turn in turns], dim=1)
    positions = model.family.position_ids(model.network, turns[1])
    if positions is not None:  # transformers numbers first prompts only
        turns[1]["position_ids"] = positions + 100
    found = {}
    for mode in ("drop", "mask"):
        pruner = FastV(keep_tokens=3, layer=1, mode=mode, turns=True)  # type: ignore[arg-type]
        with pruner.on(model.network), torch.no_grad():
            first = model.network(**turns[0], use_cache=True)
            held = first.cache if "cache" in first else first.past_key_values
            name = "cache" if "cache" in first else "past_key_values"
            second = model.network(**(turns[1] | {"attention_mask": mask, name: held}))
            token = second.logits[:, -1:].argmax(dim=-1)
            longer = torch.cat((mask, torch.ones_like(token)), dim=1)
            options = {name: held}
            if positions is not None:
                options["position_ids"] = positions[..., -1:] + 101
            third = model.network(input_ids=token, attention_mask=longer, **options)
        found[mode] = (second.logits, third.logits)
        assert pruner.kept is not None and pruner.kept.counts == [3, 6]
    assert held.layers[0].keys.shape[2] == mask.shape[1] + 1
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_text_continues_a_cache_that_was_never_pruned() -> None:
    model = model_of("llava")
    inputs = encoded(model, rows=slice(0, 1))
    with FastV(keep_tokens=16, turns=True).on(model.network), torch.no_grad():
        first = model.network(**inputs, use_cache=True)
        held = first.cache if "cache" in first else first.past_key_values
        name = "cache" if "cache" in first else "past_key_values"
        found = model.network(input_ids=inputs["input_ids"][:, -3:], **{name: held})
    assert torch.isfinite(found.logits).all()
    assert [layer.keys.shape[2] for layer in held.layers] == [inputs["input_ids"].shape[1] + 3] * 3


def test_refused_caches_and_decoding() -> None:
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache

    model = model_of("llava")
    network = model.network
    inputs = encoded(model, rows=slice(0, 1))
    config = network.config.get_text_config()
    windowed = copy.deepcopy(config)
    windowed.sliding_window, windowed.layer_types = 8, ["sliding_attention"] * 3
    with FastV(keep_tokens=4).on(network):
        with pytest.raises(CapabilityError, match="StaticCache"):
            generated(network, inputs, past_key_values=StaticCache(config, max_cache_len=64))
        with pytest.raises(CapabilityError, match=r"Sliding.*without sliding windows"):
            generated(network, inputs, past_key_values=DynamicCache(config=windowed))
        with pytest.raises(CapabilityError, match="assisted decoding"):
            generated(network, inputs, 8, assistant_model=LlamaForCausalLM(config).eval())
        with pytest.raises(CapabilityError, match="chunked prefill"):
            generated(network, inputs, prefill_chunk_size=12)
        embeds = network.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(DataError, match="`input_ids`"):
            logits(network, {"inputs_embeds": embeds})
        assert generated(network, inputs).sequences.shape[0] == 1  # and it goes on working


def test_refused_settings() -> None:
    model = model_of("llava")
    with pytest.raises(ConfigurationError, match="`layer` is 0; it must be at least 1"):
        FastV(keep_tokens=1, layer=0)
    with (
        pytest.raises(ConfigurationError, match=r"`layer` is 3, but .* 3 layers.*between 1 and 2"),
        FastV(keep_tokens=1, layer=3).on(model.network),
    ):
        pass
    with pytest.raises(ConfigurationError, match="`mode` is 'hide'"):
        FastV(keep_tokens=1, mode="hide")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`queries` is 'first'"):
        FastV(keep_tokens=1, queries="first")  # type: ignore[arg-type]
    with (
        FastV(keep_tokens=1).on(model.network),
        pytest.raises(ConfigurationError, match="already being pruned"),
        FastV(keep_tokens=2).on(model.network),
    ):
        pass
    inputs = encoded(model)
    for scorer, error, text in (
        (lambda tokens: torch.full((16,), float("nan")), DivergenceError, "not a number"),
        (lambda tokens: torch.zeros(3), ConfigurationError, "one score for each"),
    ):
        with pytest.raises(error, match=text), TokenPruner(scorer, 2).on(model.network):
            logits(model.network, inputs)


@pytest.mark.slow
def test_refused_compiled_networks() -> None:
    network = tiny_multimodal("llava")[0]
    compiled = torch.compile(network)
    network.compile()
    for one in (network, compiled):
        with (
            pytest.raises(CapabilityError, match="compiled network"),
            FastV(keep_tokens=1).on(one),  # type: ignore[arg-type]
        ):
            pass


def test_refused_kernels() -> None:
    network = tiny_multimodal("llava")[0]
    network.config.text_config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(CapabilityError, match=r"flash_attention_2.*set_attn_implementation"),
        FastV(keep_tokens=1).on(network),
    ):
        pass


def test_a_copy_is_not_pruned() -> None:
    model = model_of("llava")
    inputs = encoded(model)
    plain = logits(model.network, inputs)
    with FastV(keep_tokens=1).on(model):
        other = copy.deepcopy(model)
        assert other.rewriter is None
        assert torch.equal(logits(other.network, inputs), plain)
        assert not torch.equal(logits(model.network, inputs), plain)


@pytest.mark.parametrize("scorer", [RandomScores(seed=3), GridScores()])
def test_other_scores_need_no_attention(scorer: Any) -> None:
    model = model_of("llava")
    with TokenPruner(scorer, keep_tokens=4, layer=1).on(model.network) as pruner:
        logits(model.network, encoded(model))
    assert pruner.kept is not None and pruner.kept.places[0] is not None
    tokens = PictureTokens(torch.zeros(16, 1), 4, (4, 4), 0, 0)
    expected = scorer(tokens).topk(4).indices.sort().values
    assert pruner.kept.places[0][0].tolist() == expected.tolist()
