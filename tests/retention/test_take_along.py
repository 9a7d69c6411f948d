"""Dynamic visual reaffirmation: places, tokens, labels, features, training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mmforget.errors import AccessError, CapabilityError, ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.retention.picture_context import Picture
from mmforget.retention.remembering_model import RememberingLM
from mmforget.retention.take_along import (
    Reaffirmation,
    TakeAlongLM,
    dynamic_visual_reaffirmation,
    reaffirmed_logits,
)
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

SHORT = Reaffirmation(bridge="look again", pool=2, min_tokens=0)


def batch() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [], [two, three]],
        "question": ["what is this ?", "where is anna ?", "what are this there ?"],
        "answer": ["one two three four", "rome . is the name", "red . blue green white one two"],
        "label": torch.tensor([0, 1, 2]),
        "id": torch.arange(3),
        "weight": torch.ones(3),
    }


@pytest.fixture(scope="module", params=get_args(TinyMultimodalKind))
def any_kind(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param)).eval()


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava")).eval()


# ---- where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "settings", "places"),
    [
        ("one two three four", {}, [2]),
        ("one two three", {}, [2]),  # half of three tokens, rounded up
        ("one two . three four five six seven", {"positions": (0.2,)}, [3]),  # end of the sentence
        ("one two three . four . five six", {"positions": (0.25, 0.5, 0.6)}, [4, 6]),
        ("one two three four .", {"positions": (0.9,)}, []),  # nothing would follow
        ("one", {}, []),
        ("one two three four", {"min_tokens": 5}, []),
        ("one two three four", {"max_tokens": 3}, []),
        ("one . look at . look again who", {"before_markers": True}, [2, 5]),
        ("look one look who", {"before_markers": True}, []),  # no sentence starts there
        ("one look two look", {"most_markers": 2}, [2]),
        ("one look two look", {"most_markers": 1}, []),
    ],
)
def test_places(
    model: MultimodalLM, answer: str, settings: dict[str, Any], places: list[int]
) -> None:
    tokenizer = model.processor.tokenizer
    chosen = Reaffirmation(**{"min_tokens": 0, "markers": ("look",), **settings})
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert chosen.places(tokenizer, tokens) == places


def test_words_in_pieces_stay_whole() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["Ġ", "a", "b", ".", "Ġa", "Ġb", "3"]
    core = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [("Ġ", "a"), ("Ġ", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    settings = Reaffirmation(min_tokens=0)
    words = tokenizer("ab ab ab ab")["input_ids"]  # a, b, Ġa, b, Ġa, b, Ġa, b
    assert len(words) == 8 and settings.places(tokenizer, words) == [4]
    assert settings.places(tokenizer, words[:6]) == [4]  # the third is in the middle of a word
    number = tokenizer("ab 3.3 ab. ab")["input_ids"]
    tokens = [tokenizer.decode([token]) for token in number]
    place = settings.places(tokenizer, number)[0]
    assert tokens[place - 1] == "." and "".join(tokens[:place]) == "ab 3.3 ab."


# ---- what ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_and_labels(model: MultimodalLM) -> None:
    tokenizer, given = model.processor.tokenizer, batch()
    found = dynamic_visual_reaffirmation(model, given, SHORT, captions=["", "", "see"])
    assert found.reread == [1, 0, 1]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    image = ids("<image>")
    prompt = ids("user :") + 16 * image + ids("what is this ? assistant :")
    first, second = ids("one two look again"), ids("three four </s>")
    row = prompt + first + 4 * image + second
    assert found.input_ids[0, : len(row)].tolist() == row
    wanted = [IGNORED] * len(prompt) + first + [IGNORED] * 4 + second
    assert found.labels[0, : len(row)].tolist() == wanted
    assert (found.labels[0, len(row) :] == IGNORED).all()
    assert found.inputs["attention_mask"][0].sum() == len(row)
    # two pictures, each pooled; the caption is learnt
    last = found.input_ids[2].tolist()
    place = last.index(ids("again")[0]) + 1
    unknown = ids("see")
    assert last[place : place + 9] == 8 * image + unknown
    assert found.labels[2, place : place + 9].tolist() == [IGNORED] * 8 + unknown
    moved = dynamic_visual_reaffirmation(model, given, SHORT, moved=[True, True, False])
    bare = ids("user : what is this ? assistant :")
    row = bare + first + 4 * image + second
    assert moved.input_ids[0, : len(row)].tolist() == row
    assert moved.labels[0, : len(row)].tolist() == [IGNORED] * (len(row) - 3) + second
    assert torch.equal(moved.labels[1], found.labels[1][: moved.labels.shape[1]])
    one = dynamic_visual_reaffirmation(
        model, given, Reaffirmation("", 1, min_tokens=0, pictures=(1,)), rows=[False, True, True]
    )
    assert one.reread == [0, 0, 1]
    extra = int((one.input_ids[2] == image[0]).sum()) - 32
    assert extra == 16
    own = one.inputs["inputs_embeds"][2][one.input_ids[2] == image[0]]
    assert torch.equal(own[16:32], own[32:])


@torch.no_grad()
def test_what_is_shown_again_is_the_average_of_the_grid(any_kind: MultimodalLM) -> None:
    model, given = any_kind, batch()
    found = dynamic_visual_reaffirmation(model, given, SHORT)
    inputs = model.inputs(given)
    tokens = model.family.encode_images(model.network, inputs).pooled
    grids = [one.unflatten(0, (4, 4)) for one in tokens]
    small = [
        torch.stack([grid[i : i + 2, j : j + 2].mean((0, 1)) for i in (0, 2) for j in (0, 2)])
        for grid in grids
    ]
    visual = model.family.visual_mask(model.network, found.input_ids)
    shown = [found.inputs["inputs_embeds"][row][visual[row]] for row in (0, 2)]
    for own, wanted in zip(
        shown,
        ([tokens[0], small[0]], [tokens[1], tokens[2], small[1], small[2]]),
        strict=True,
    ):
        assert torch.allclose(own, torch.cat(wanted), atol=1e-5)
    assert (found.labels[visual] == IGNORED).all()
    before, after = model.family.picture_frame(model.network, model.processor)
    assert not torch.isin(found.labels, torch.tensor([*before, *after])).any()


@torch.no_grad()
def test_without_rows_nothing_changes(any_kind: MultimodalLM) -> None:
    """The same logits from embeddings as from pixels, positions in three dimensions included."""
    model, given = any_kind, batch()
    found = dynamic_visual_reaffirmation(model, given, SHORT, rows=[False] * 3)
    native = model.answer_logits(given)
    own = reaffirmed_logits(model, found)
    assert torch.equal(own.labels, native.labels)
    learnt = own.labels != IGNORED
    assert torch.allclose(own.logits[learnt], native.logits[learnt], atol=1e-5)
    assert torch.allclose(own.hidden[learnt], native.hidden[learnt], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_in_three_dimensions(kind: Any) -> None:
    model = MultimodalLM(*tiny_multimodal(kind)).eval()
    found = dynamic_visual_reaffirmation(model, batch(), SHORT)
    visual = model.family.visual_mask(model.network, found.input_ids)
    positions = found.inputs["position_ids"][:, 0][:, visual[0]]
    start = int(visual[0].int().argmax())
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    assert positions[:, :16].tolist() == [
        [start] * 16,
        (start + rows).tolist(),
        (start + columns).tolist(),
    ]
    # between: two frame tokens, the question, the start of the answer and the bridge
    again = int(visual[0].nonzero()[16, 0])
    first = again - 16 + 4
    rows, columns = torch.arange(4) // 2, torch.arange(4) % 2
    assert positions[:, 16:].tolist() == [
        [first] * 4,
        (first + rows).tolist(),
        (first + columns).tolist(),
    ]
    after = found.inputs["position_ids"][:, 0, again + 4]
    assert after.tolist() == [first + 2] * 3


def test_gradients_reach_the_projector_through_what_is_shown_again(model: MultimodalLM) -> None:
    own = copy.deepcopy(model)
    given = {key: value[:1] for key, value in batch().items()}
    found = dynamic_visual_reaffirmation(own, given, SHORT, moved=[True])
    reaffirmed_logits(own, found).losses().mean.sum().backward()
    gradients = [p.grad for p in own.family.projector_of(own.network).parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


# ---- training -----------------------------------------------------------------------------------


def test_training_shows_pictures_again_and_evaluation_does_not(
    quiet_trainer: Callable[..., Trainer],
) -> None:
    network, processor = tiny_multimodal("llava")
    settings: dict[str, Any] = {"bridge": "look again", "pool": 2, "min_tokens": 0, "lr": 1e-3}
    taken = TakeAlongLM(network, processor, **settings)
    plain = MultimodalLM(network, processor)
    given = batch()
    base = plain.loss(given)
    assert torch.equal(taken.eval().loss(given), base)
    own = taken.train().loss(given)
    wanted = reaffirmed_logits(taken, dynamic_visual_reaffirmation(taken, given, SHORT))
    assert torch.equal(own, wanted.losses().mean)
    assert not torch.allclose(own, base, atol=1e-3)
    none = TakeAlongLM(network, processor, share=0.0, **settings).train()
    assert torch.allclose(none.loss(given), base, atol=1e-5)
    half = TakeAlongLM(network, processor, share=0.5, moved=0.5, **settings).train()
    many = {key: value[:1] * 40 for key, value in given.items() if isinstance(value, list)}
    many["id"] = torch.arange(40)

    def rows(order: Tensor) -> Tensor:
        losses = half.loss(many | {"id": order})
        return losses[order.argsort()]

    found = rows(torch.arange(40))
    # three kinds of rows, in every order the same ones
    kinds = found.detach().mul(1e4).round().unique(return_counts=True)[1]
    assert len(kinds) == 3 and kinds.min() >= 4
    assert torch.allclose(found, rows(torch.arange(40).flip(0)), atol=1e-5)
    before = {name: p.clone() for name, p in half.network.named_parameters()}
    quiet_trainer(max_epochs=1).fit(half, DataLoader([given], batch_size=None))  # type: ignore[arg-type]
    for name, parameter in half.network.named_parameters():
        if half.family.part(name) == "vision":
            assert torch.equal(before[name], parameter)
    assert not torch.equal(before["lm_head.weight"], half.network.lm_head.weight)


def test_bad_input(model: MultimodalLM) -> None:
    given = batch()
    for settings, message in (
        ({"pool": 0}, "`pool` is 0"),
        ({"positions": (1.0,)}, r"`positions` is \[1.0\]"),
        ({"positions": ()}, r"`positions` is \[\]"),
        ({"min_tokens": 9, "max_tokens": 8}, "`min_tokens` is 9"),
        ({"before_markers": True, "markers": ()}, "`markers` is empty"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Reaffirmation(**settings)
    with pytest.raises(ConfigurationError, match="`share` is 2"):
        TakeAlongLM(model.network, model.processor, share=2)
    with pytest.raises(ConfigurationError, match=r"`pictures` is \[1\], but a question has 1"):
        dynamic_visual_reaffirmation(model, given, Reaffirmation(min_tokens=0, pictures=(1,)))
    with pytest.raises(AccessError, match="needs answers"):
        dynamic_visual_reaffirmation(model, {k: v for k, v in given.items() if k != "answer"})
    short = copy.copy(model)
    short.max_length = 52
    assert short.inputs(given)["input_ids"].shape[1] <= 52
    with pytest.raises(DataError, match="with its pictures shown again, more than `max_length` 52"):
        dynamic_visual_reaffirmation(short, given, SHORT)
    with pytest.raises(CapabilityError, match="form no grid"):
        Picture(torch.zeros(7, 2), None).pooled(2)
    remembering = RememberingLM(model.network, model.processor)
    with pytest.raises(CapabilityError, match="a model with Vision Remember"):
        dynamic_visual_reaffirmation(remembering, given, SHORT)


def test_pooling_rounds_up() -> None:
    tokens = torch.arange(12.0)[:, None]
    found = Picture(tokens, (3, 4)).pooled(2)
    assert found.grid == (2, 2) and len(found.tokens) == 4
    assert Picture(tokens, (3, 4)).pooled(4).tokens.item() == 5.5
    # rows 0 and 1, then rows 1 and 2
    assert found.tokens[:, 0].tolist() == [2.5, 4.5, 6.5, 8.5]
