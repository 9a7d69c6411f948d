"""Periodic visual calibration: caches, contexts, re-read points, batches."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention import visual_calibration
from mmforget.retention.picture_context import Reader, Span, block, collated, prompts, words
from mmforget.retention.token_pooling import PooledTokens
from mmforget.retention.visual_calibration import CalibratedAnswer, PeriodicVisualCalibration
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

MODES = ("move", "append", "refresh")


def asked() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [], [two, three]],
        "question": ["what is this ?", "where is anna ?", "what are this there ?"],
    }


@pytest.fixture(scope="module", params=get_args(TinyMultimodalKind))
def any_kind(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param), max_new_tokens=6).eval()


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava"), max_new_tokens=6).eval()


def plain(model: MultimodalLM, given: dict[str, Any]) -> list[str]:
    banned = list(model.family.image_token_ids(model.network))
    return model.answer(given["images"], given["question"], suppress_tokens=banned)


def answers(model: MultimodalLM, **settings: Any) -> list[CalibratedAnswer]:
    given = asked()
    calibrated = PeriodicVisualCalibration(
        model, **{"bridge": "look again", "pool": 2, "every": 2, **settings}
    )
    return calibrated.generate(given["images"], given["question"])


def keys(reader: Reader) -> list[Tensor]:
    return [layer.keys.clone() for layer in reader.cache.layers]


@torch.no_grad()
def test_reading_on_top_equals_reading_everything(any_kind: MultimodalLM) -> None:
    """Text-only rows and rows of other lengths included; what was cached stays as it was."""
    model, rows = any_kind, prompts(any_kind, asked())
    said = words(model, "one two three")
    pieces = [
        said + words(model, "look again") + block(model, [p.pooled(2) for p in row.pictures])
        for row in rows
    ]
    pieces[0] = pieces[0] + words(model, "who")
    stepwise = Reader(model)
    stepwise.read(rows)
    before = keys(stepwise)
    found = [stepwise.read(pieces)]
    for old, new in zip(before, keys(stepwise), strict=True):
        assert torch.equal(old, new[:, :, : old.shape[2]])
    found.append(stepwise.read([words(model, "red")] * 3))
    whole = [row + piece for row, piece in zip(rows, pieces, strict=True)]
    wanted = [Reader(model).read(whole)]
    wanted.append(Reader(model).read([row + words(model, "red") for row in whole]))
    for one, other in zip(found, wanted, strict=True):
        real = ~other.isinf()
        assert torch.allclose(one[real], other[real], atol=1e-5)
    native = Reader(model)
    logits = native.read_native(model.inputs(asked(), padding="left", answers=False))
    own = Reader(model).read(rows)
    assert torch.allclose(logits[~own.isinf()], own[~own.isinf()], atol=1e-5)
    for old, new in zip(keys(native), before, strict=True):
        assert torch.allclose(old[0], new[0], atol=1e-5)


@torch.no_grad()
def test_a_moved_picture_in_one_forward_pass(any_kind: MultimodalLM) -> None:
    """Scores of the first token behind the picture, from a context that the test builds itself."""
    model, given = any_kind, asked()
    tokenizer, network = model.processor.tokenizer, model.network
    calibrated = PeriodicVisualCalibration(model, bridge="look again", pool=2)
    rows = calibrated._rows(given["images"], given["question"])
    said = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    for row in rows:
        row.answer.tokens = list(said)
    found = Reader(model).read([calibrated._context(row) for row in rows])
    for number in (0, 2):
        shown, question = given["images"][number], given["question"][number]
        inputs = model.inputs({"images": [shown], "question": [question]}, answers=False)
        features = model.family.encode_images(network, inputs).pooled
        bare = model.inputs({"images": [[]], "question": [question]}, answers=False)
        before, after = model.family.picture_frame(network, model.processor)
        image = model.family.image_token_ids(network)[0]
        text = tokenizer("one two three look again", add_special_tokens=False)["input_ids"]
        block_ids = [*before, *[image] * 4, *after] * len(features)
        ids = torch.tensor([bare["input_ids"][0].tolist() + text + block_ids])
        embeds = network.get_input_embeddings()(ids)
        plane = torch.stack(features).transpose(1, 2).unflatten(2, (4, 4))
        small = torch.nn.functional.avg_pool2d(plane, 2).flatten(2).transpose(1, 2)
        embeds[ids == image] = small.flatten(0, 1)
        mask = torch.ones_like(ids)
        sizes = model.family.grid_inputs(network, [(2, 2)] * len(features))
        known = {"input_ids": ids, "attention_mask": mask} | sizes
        positions = model.family.position_ids(network, known)
        logits = network(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[
            0, -1
        ]
        real = ~found[number].isinf()
        assert torch.allclose(found[number][real], logits[real], atol=1e-5)
    assert calibrated._context(rows[1]).ids == rows[1].prompt.ids + said  # text only


def test_no_points_no_pictures_and_no_bridge_is_ordinary_decoding(any_kind: MultimodalLM) -> None:
    model, given = any_kind, asked()
    wanted = plain(model, given)
    none = answers(model, every=None, at=())
    assert [one.text for one in none] == wanted
    assert all(one.reread == () and one.extra_tokens == 0 for one in none)
    assert [one.text for one in answers(model, mode="refresh", bridge="")] == wanted
    for mode in MODES:
        assert answers(model, mode=mode)[1].text == wanted[1]  # text only


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_rows_do_not_depend_on_their_neighbours(kind: Any) -> None:
    model, given = MultimodalLM(*tiny_multimodal(kind), max_new_tokens=5).eval(), asked()
    for mode in MODES:
        together = answers(model, mode=mode)
        calibrated = PeriodicVisualCalibration(
            model, bridge="look again", pool=2, every=2, mode=mode
        )
        alone = calibrated.generate(given["images"], given["question"], batch_size=1)
        assert together == alone
        assert any(one.reread for one in together)


def test_what_is_counted(model: MultimodalLM) -> None:
    bridge = 2
    for mode, extra in (("move", (4, 8)), ("append", (4, 8)), ("refresh", (0, 0))):
        found = answers(model, mode=mode)
        assert [one.reread for one in found] == [(2, 4), (), (2, 4)]
        assert [one.tokens for one in found] == [6, 6, 6]
        assert found[0].extra_tokens == 2 * (bridge + extra[0])
        assert found[2].extra_tokens == 2 * (bridge + extra[1])
        assert "look again" not in found[0].text
    assert answers(model, pictures=(0,), pool=1)[2].extra_tokens == 2 * (bridge + 16)
    assert answers(model, most=1)[0].reread == (2,)
    assert answers(model, every=None, at=(0.5,))[0].reread == (3,)
    assert answers(model, every=None, at=(0.5, 0.75), expected_tokens=4)[0].reread == (2, 3)
    assert answers(model, every=None, at=(0.5,), expected_tokens=400)[0].reread == ()


def test_triggers_and_ends_of_sentences(model: MultimodalLM, monkeypatch: Any) -> None:
    base = answers(model, every=None, at=())
    texts: list[str] = []

    def second(text: str) -> bool:
        texts.append(text)
        return len(text.split()) == 2 and text == " ".join(base[0].text.split()[:2])

    found = answers(model, every=None, trigger=second)
    assert found[0].reread == (2,) and found[1].reread == () == found[2].reread
    assert base[0].text.split()[0] in texts
    assert found[0] == answers(model, every=2, most=1)[0]
    # answers that are given beforehand
    script = model.processor.tokenizer("one two . three four six", add_special_tokens=False)
    steps = iter(script["input_ids"])

    class Scripted(Reader):
        def _forward(self, *args: Any) -> Tensor:
            logits = super()._forward(*args)
            logits[:, next(steps)] = 1000.0
            return logits

    monkeypatch.setattr(visual_calibration, "Reader", Scripted)
    shown = PeriodicVisualCalibration(
        model, every=1, most=1, snap=True, bridge="look again", pool=2
    )
    one = shown.generate([asked()["images"][0]], ["what is this ?"])[0]
    assert one == ("one two . three four six", 6, (3,), 6)


def test_nothing_is_left_on_the_model(model: MultimodalLM) -> None:
    model.train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    answers(model)
    assert model.network.training
    model.eval()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_spans_hold_as_many_placeholders_as_visual_tokens(model: MultimodalLM) -> None:
    row = prompts(model, asked())[2]
    assert [len(picture.tokens) for picture in row.pictures] == [16, 16]
    found = collated(model, [row, Span([1])], padding="right")
    assert found["attention_mask"].sum(dim=1).tolist() == [len(row.ids), 1]
    bare = prompts(model, asked(), pictures=False)[2]
    assert not bare.pictures and len(bare.ids) == len(row.ids) - 32


def test_bad_input(model: MultimodalLM) -> None:
    for settings, message in (
        ({"mode": "moved"}, "`mode` is 'moved', did you mean 'move'"),
        ({"every": 0}, "`every` is 0"),
        ({"pool": 0}, "`pool` is 0"),
        ({"every": 2, "trigger": bool}, "`every` and `trigger` are both set"),
        ({"every": None, "at": (0.0,)}, r"`at` is \[0.0\]"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            PeriodicVisualCalibration(model, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"`pictures` is \[1\], but a question has 1"):
        answers(model, pictures=(1,))
    spared = pytest.raises(ConfigurationError, match="PooledTokens spares visual tokens")
    with spared, PooledTokens(keep_tokens=4).on(model):
        answers(model)
    with pytest.raises(DataError, match="1 questions, but 0 lists of pictures"):
        PeriodicVisualCalibration(model).generate([], ["what ?"])
