"""The boundary around a text, with the shipped CLIP model."""

from __future__ import annotations

import pytest
import torch

from mmforget.attacks.generator_report import GeneratorAttackReport
from mmforget.attacks.prompt_boundary import (
    LEAST_COSINE,
    boundary_robustness,
    moved_embeddings,
    prompt_boundary,
    word_embeddings,
)
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, RequestError
from mmforget.models.base import state_hash
from mmforget.models.clip import load_clip
from mmforget.models.concept_guide import ConceptGuide
from mmforget.testing.painter import is_red, painter


@pytest.fixture(scope="module")
def guide() -> ConceptGuide:
    return ConceptGuide(load_clip("digit_world"), [ConceptSpec("red")], {"red": ["blue", "green"]})


def anything(images: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(images), dtype=torch.bool)


def test_the_best_of_all_neighbours_counts(guide):
    report = prompt_boundary(
        painter(), guide, is_red, paraphrases=["a red digit"], directions=3, n=16, steps=3
    )
    rates = [one["rate"] for one in report.details["neighbours"]]
    assert report.rate == max(rates)
    assert [one["radius"] for one in report.details["neighbours"]] == [0, 0.05, 0.1, 0.2]
    cosines = [one["cosine"] for one in report.details["neighbours"]]
    assert all(LEAST_COSINE <= cosine < 1 for cosine in cosines)
    # the farther, the less alike
    assert cosines[1] > cosines[2] > cosines[3]
    assert report.pictures.shape == (16, 3, 8, 8)


def test_guide_and_model_stay_as_they_were(guide):
    model, targets = painter(), guide.targets.clone()
    before = state_hash(model), state_hash(guide.clips[0])
    reports = [
        prompt_boundary(model, guide, anything, paraphrases=[], directions=1, n=4, steps=1)
        for _ in range(2)
    ]
    assert (state_hash(model), state_hash(guide.clips[0])) == before
    assert torch.equal(guide.targets, targets)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert reports[0].details == reports[1].details
    assert reports[0].rate == reports[0].native == 1


def test_only_the_wanted_embeddings_move(guide):
    clip = guide.clips[0]
    table = word_embeddings(clip)
    row = int(clip.tokens(["red"])[0, 1])
    plain = clip.encode_texts(["red", "blue"])
    with moved_embeddings(table, {row: torch.ones(table.embedding_dim)}):
        moved = clip.encode_texts(["red", "blue"])
    assert torch.equal(moved[1], plain[1])
    assert not torch.allclose(moved[0], plain[0])
    assert torch.equal(clip.encode_texts(["red", "blue"]), plain)


def test_wordings_come_from_the_concept_if_none_are_given(guide):
    report = prompt_boundary(painter(), guide, is_red, directions=0, n=2, steps=1)
    texts = [one["text"] for one in report.details["neighbours"]]
    assert texts == report.settings["paraphrases"]
    assert "a picture of red" in texts


def test_robustness_is_relative_to_the_original():
    def report(rate):
        return GeneratorAttackReport("prompt_boundary", rate, 10, 0.0, 1.0, {})

    assert boundary_robustness(report(0.2), report(0.8)) == pytest.approx(0.75)
    assert boundary_robustness(report(0.2), report(0.0)) is None
    assert boundary_robustness(report(None), report(0.5)) is None


def test_wrong_settings_are_refused(guide):
    with pytest.raises(ConfigurationError, match="`directions` is -1"):
        prompt_boundary(painter(), guide, is_red, directions=-1)
    with pytest.raises(ConfigurationError, match="`paraphrases` is empty"):
        prompt_boundary(painter(), guide, is_red, paraphrases=[], directions=0)
    with pytest.raises(RequestError, match="more tokens"):
        prompt_boundary(painter(), guide, is_red, paraphrases=["red " * 40])
