"""The guide: margins over alternatives, directions, and texts that cannot be told apart."""

from __future__ import annotations

import pytest
import torch

from mmforget import ConceptSpec, load_clip
from mmforget.data.digit_world import DIGITS, DigitWorld
from mmforget.errors import ConfigurationError, RequestError
from mmforget.models.base import state_hash
from mmforget.models.clip import ClipModel
from mmforget.models.concept_guide import ConceptGuide

OTHERS = [digit for digit in DIGITS if digit != "seven"]


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return load_clip("digit_world")


@pytest.fixture(scope="module")
def guide(clip: ClipModel) -> ConceptGuide:
    return ConceptGuide(clip, [ConceptSpec("seven")], {"seven": OTHERS})


def test_margins_are_log_odds_of_the_softmax_over_all_alternatives(
    guide: ConceptGuide, clip: ClipModel
) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embedding = guide.embed(images)
    texts = torch.cat([guide.targets, guide.others[0]])
    probability = (guide.scale * embedding @ texts.T).softmax(1)[:, 0]
    assert torch.allclose(guide.probabilities(images)[:, 0], probability, atol=1e-5)
    assert guide.scale == pytest.approx(clip.network.logit_scale.exp().item())


def test_it_sees_real_digits(guide: ConceptGuide) -> None:
    data = DigitWorld(strokes=100, eval_variants=1).dataset("test")
    assert data.labels is not None
    rows = range(len(data))
    found = guide.probabilities(data[list(rows)]["image"])[:, 0] > 0.5
    assert float((found == torch.as_tensor(data.labels == 7)).double().mean()) > 0.95


def test_pictures_have_gradients_and_the_model_has_none(guide: ConceptGuide) -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    guide.margins(guide.embed(images)).sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0
    assert all(p.grad is None for clip in guide.clips for p in clip.parameters())


def test_the_given_model_is_left_alone(clip: ClipModel) -> None:
    before, mode = state_hash(clip), clip.training
    guide = ConceptGuide(clip, [ConceptSpec("seven")], {"seven": OTHERS})
    assert guide.clips[0] is not clip
    assert state_hash(clip) == before and clip.training == mode
    assert any(parameter.requires_grad for parameter in clip.parameters())


def test_two_models_count_the_same(clip: ClipModel) -> None:
    one = ConceptGuide(clip, [ConceptSpec("seven")], {"seven": OTHERS})
    two = ConceptGuide([clip, clip], [ConceptSpec("seven")], {"seven": OTHERS})
    images = torch.rand(3, 3, 32, 32)
    assert torch.allclose(one.probabilities(images), two.probabilities(images), atol=1e-5)


def test_alternatives_default_to_what_is_preserved_then_to_the_anchor(clip: ClipModel) -> None:
    kept = ConceptGuide(clip, [ConceptSpec("seven", preserve=("one", "two"))])
    assert kept.alternatives == {"seven": ("one", "two")}
    assert ConceptGuide(clip, [ConceptSpec("seven", anchor="one")]).alternatives["seven"] == (
        "one",
    )
    assert ConceptGuide(clip, [ConceptSpec("seven")]).alternatives["seven"] == ("a picture",)


def test_directions_lead_from_the_concept_to_its_anchor(clip: ClipModel) -> None:
    guide = ConceptGuide(clip, [ConceptSpec("seven", anchor="one")])
    direction = guide.directions()[0]
    one, seven = guide.texts(["one", "seven"], guide.concepts[0])
    assert float(direction.norm()) == pytest.approx(1)
    assert float((one - seven) @ direction) > 0.99 * float((one - seven).norm())


def test_pictures_that_are_not_square_are_padded_not_cut(guide: ConceptGuide) -> None:
    wide = torch.rand(1, 3, 20, 32)
    padded = torch.cat([wide[:, :, :1].expand(-1, -1, 6, -1), wide,
                        wide[:, :, -1:].expand(-1, -1, 6, -1)], dim=2)  # fmt: skip
    assert torch.allclose(guide.embed(wide), guide.embed(padded), atol=1e-6)


def test_a_text_that_is_too_close_is_refused_with_the_similarity(clip: ClipModel) -> None:
    with pytest.raises(RequestError, match=r"cannot tell 'seven' from 'SEVEN'.* 1\.000"):
        ConceptGuide(clip, [ConceptSpec("seven")], {"seven": ["SEVEN"]})
    similarity = float(
        ConceptGuide(clip, [ConceptSpec("seven")], {"seven": ["one"]}).others[0][0]
        @ ConceptGuide(clip, [ConceptSpec("seven")], {"seven": ["one"]}).targets[0]
    )
    with pytest.raises(RequestError, match="'one'"):
        ConceptGuide(
            clip, [ConceptSpec("seven")], {"seven": ["one"]}, max_similarity=similarity - 0.01
        )


def test_a_negation_is_warned_of(clip: ClipModel, caplog: pytest.LogCaptureFixture) -> None:
    ConceptGuide(clip, [ConceptSpec("seven")], {"seven": ["not a seven", "one"]}, 1.1)
    assert "name the opposite" in caplog.text


def test_alternatives_of_something_else_are_refused(clip: ClipModel) -> None:
    with pytest.raises(ConfigurationError, match="'eight'"):
        ConceptGuide(clip, [ConceptSpec("seven")], {"eight": ["one"]})
    with pytest.raises(ConfigurationError, match="at least one CLIP model"):
        ConceptGuide([], [ConceptSpec("seven")])
