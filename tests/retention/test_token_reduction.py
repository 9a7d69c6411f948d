"""Every reducer through the same calls, on a model and on a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.token_reduction import TOKEN_REDUCERS, PictureTokens, token_reducer
from mmforget.testing.tiny_multimodal import tiny_multimodal, tiny_pictures


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava")).eval()


def batch() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [two, three], []],
        "question": ["what is this ?", "who is the person shown in it ?", "where is anna ?"],
        "answer": ["anna", "clara please", "rome"],
    }


def brightness(tokens: PictureTokens) -> Tensor:
    """Sees the pictures themselves."""
    assert tokens.image is not None
    cells = torch.nn.functional.adaptive_avg_pool2d(tokens.image.float().mean(dim=0)[None], (4, 4))
    return cells.flatten()


def settings(name: str) -> dict[str, Any]:
    return {"scorer": brightness} if name.startswith("chosen") else {}


@pytest.mark.parametrize("name", TOKEN_REDUCERS)
def test_every_reducer(model: MultimodalLM, name: str) -> None:
    asked = (batch()["images"], batch()["question"])
    plain, losses = model.answer(*asked, max_new_tokens=3), model.loss(batch())
    features = model.features(batch())
    reducer = token_reducer(name, keep_tokens=4, **settings(name))
    with reducer.on(model) as same:
        assert same is reducer
        answers = model.answer(*asked, max_new_tokens=3)
        assert reducer.kept is not None and reducer.kept.counts == [4, 8, None]
        fewer = model.loss(batch())
        assert model.features(batch()).shape == features.shape
    assert answers[2] == plain[2]
    torch.testing.assert_close(fewer[2], losses[2], rtol=0, atol=1e-5)
    assert ((fewer - losses)[:2].abs() > 1e-5).all()
    assert model.answer(*asked, max_new_tokens=3) == plain
    assert torch.equal(model.loss(batch()), losses)
    with token_reducer(name, keep_ratio=1.0, **settings(name)).on(model):
        assert torch.equal(model.loss(batch()), losses)
    with token_reducer(name, keep_tokens=0, **settings(name)).on(model) as empty:
        model.answer(*asked, max_new_tokens=2)
        assert empty.kept is not None and empty.kept.ratio == 0.0


@pytest.mark.parametrize("name", TOKEN_REDUCERS)
def test_the_same_on_a_network(model: MultimodalLM, name: str) -> None:
    reducer = token_reducer(name, keep_tokens=4, **settings(name))
    asked = (batch()["images"], batch()["question"])
    with reducer.on(model):
        expected = model.answer(*asked, max_new_tokens=3)
    inputs = model.inputs(batch(), padding="left", answers=False)
    with reducer.on(model.network), torch.no_grad():
        reduced = reducer.reduced(model.network, inputs, batch()["images"])
        ids = model.network.generate(
            **model.family.model_inputs(reduced), do_sample=False, max_new_tokens=3
        )
    new = ids[:, reduced["input_ids"].shape[1] :]
    texts = model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert [text.strip() for text in texts] == expected


def test_scorers_choose_by_the_picture(model: MultimodalLM) -> None:
    expected = [
        [brightness(tokens_of(picture)).topk(4).indices.sort().values.tolist() for picture in row]
        for row in batch()["images"][:2]
    ]
    for name in ("chosen", "chosen_inside"):
        with token_reducer(name, keep_tokens=4, scorer=brightness).on(model) as reducer:
            model.answer(batch()["images"], batch()["question"], max_new_tokens=1, num_beams=2)
        assert reducer.kept is not None
        rows = [row for row in reducer.kept.places if row is not None]
        found = [[one.tolist() for one in row] for row in rows]
        assert found == (expected if name == "chosen" else [*expected[:1] * 2, *expected[1:] * 2])


def tokens_of(picture: Tensor) -> PictureTokens:
    return PictureTokens(torch.zeros(16, 1), 4, (4, 4), 0, 0, image=picture)


def test_one_reducer_at_a_time(model: MultimodalLM) -> None:
    first, second = (token_reducer("random", keep_tokens=n) for n in (4, 8))
    with (
        first.on(model),
        pytest.raises(ConfigurationError, match="ChosenTokens already rewrites"),
        second.on(model),
    ):
        pass
    assert model.rewriter is None
    with pytest.raises(ConfigurationError, match="no reducer 'fastv'; did you mean 'fast_v'"):
        token_reducer("fastv", keep_tokens=4)
