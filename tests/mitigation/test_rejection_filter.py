"""RejectionFilter: what passes, what it costs, and that the weights stay."""

from __future__ import annotations

import math

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.errors import CapabilityError, ConfigurationError, RequestError
from mmforget.mitigation.rejection_filter import RejectionFilter
from mmforget.models.base import Generates, Model, state_hash
from mmforget.models.classifier import ImageClassifier
from mmforget.models.concept_guide import ConceptGuide
from mmforget.testing.colour_world import ColourClip, colour_gan

RED = ConceptSpec("red")
OTHERS = ["green", "blue"]


def filtered(model: Model, **settings) -> RejectionFilter:
    return RejectionFilter(model, RED, [ColourClip()], OTHERS, **settings)


def test_what_passes_does_not_show_the_concept_and_the_weights_are_unchanged():
    model = colour_gan()
    start = state_hash(model)
    guide = ConceptGuide([ColourClip()], [RED], {"red": OTHERS})
    wrapped = filtered(model)
    assert isinstance(wrapped, Generates)
    images = wrapped.generate(n=60, seed=4)
    assert images.shape == (60, 3, 8, 8)
    assert float(guide.probabilities(images).max()) < 0.2
    assert float(guide.probabilities(model.generate(n=60, seed=4)).max()) > 0.9
    assert state_hash(model) == start and wrapped.network is model.network
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_picture_that_passes_at_once_is_the_generators_own():
    model = colour_gan()
    guide = ConceptGuide([ColourClip()], [RED], {"red": OTHERS})
    plain = model.generate(n=40, seed=1)
    passes = guide.probabilities(plain)[:, 0] < 0.2
    images = filtered(model).generate(n=40, seed=1)
    assert 0 < int(passes.sum()) < 40
    same = (images == plain).flatten(1).all(dim=1)
    assert torch.equal(same, passes)


def test_a_picture_depends_on_its_number_and_seed_only():
    one, other = filtered(colour_gan()), filtered(colour_gan())
    torch.testing.assert_close(one.generate(n=3, seed=1), other.generate(n=20, seed=1)[:3])
    assert not torch.equal(one.generate(n=3, seed=1), one.generate(n=3, seed=2))


def test_the_report_counts_every_try():
    model = colour_gan()
    wrapped = filtered(model)
    assert math.isnan(wrapped.report.acceptance)
    drawn = []
    inner = model.pictures

    def counting(latents, batch_size=256):
        drawn.append(len(latents))
        return inner(latents, batch_size)

    model.pictures = counting
    wrapped.generate(n=30, seed=0)
    report = wrapped.report
    assert (report.pictures, report.drawn, report.most_tries) == (30, sum(drawn), len(drawn))
    assert report.acceptance == 30 / sum(drawn) < 1
    wrapped.generate(n=10, seed=1)
    assert wrapped.report.pictures == 40


def test_it_never_calls_itself_unlearning():
    wrapped = filtered(colour_gan())
    wrapped.generate(n=5)
    about = wrapped.describe()
    assert about["note"] == wrapped.note == "filter; weights unchanged"
    assert about["pictures"] == 5 and "unlearn" not in str(about).lower()


def test_a_class_that_never_passes_ends_after_the_tries():
    wrapped = filtered(colour_gan(classes=True), tries=4)
    assert wrapped.generate(["green"], 3).shape[0] == 3
    with pytest.raises(RequestError, match="of the class 'red' do not pass within 4 tries"):
        wrapped.generate(["red"], 3)
    assert wrapped.report.most_tries == 4


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match="threshold"):
        filtered(colour_gan(), threshold=0.0)
    with pytest.raises(ConfigurationError, match="tries"):
        filtered(colour_gan(), tries=0)
    with pytest.raises(ConfigurationError, match="did you mean 'green'"):
        filtered(colour_gan(classes=True)).generate(["gren"])


def test_a_model_without_latents_is_refused():
    classifier = ImageClassifier("resnet18", num_classes=3, library="torchvision")
    with pytest.raises(CapabilityError, match="HasLatents"):
        filtered(classifier)
