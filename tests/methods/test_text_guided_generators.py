"""ClipDirection, ClipRepulsion, LatentNegation and AnchorDistillation on a tiny generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmforget.concept import ConceptSpec
from mmforget.erase import run_method
from mmforget.errors import ConfigurationError, RequestError
from mmforget.methods.anchor_distillation import AnchorDistillation
from mmforget.methods.clip_direction import ClipDirection
from mmforget.methods.clip_repulsion import ClipRepulsion
from mmforget.methods.latent_negation import LatentNegation
from mmforget.methods.latent_sorting import guide_probabilities, sort_latents
from mmforget.models.clip import load_clip
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN
from mmforget.testing.generator_conformance import tiny_gan

FEW = {"pool": 64, "bearing": 0.5, "clear": 0.5, "batch_size": 4, "retain_batch_size": 4}


@pytest.fixture(scope="module")
def clip():
    return load_clip("digit_world")


@pytest.fixture(scope="module")
def gan():
    return tiny_gan()


@pytest.fixture
def make(clip, gan):
    def made(method, concept=None, **settings):
        concept = concept or ConceptSpec("white")
        return method(gan, concept, clip, alternatives=["pink"], **(FEW | settings))

    return made


def prepared(method, steps=1):
    """The method after so many steps, still with its pool."""
    run_method(method, steps, progress=False)
    return method


def batch(method, rows=(0, 1, 2)):
    return {name: records[list(rows)] for name, records in method.records.items()}


# ---- sorting ------------------------------------------------------------------------------------


class Known:
    """A guide that reads the probability of two concepts from two pixels."""

    concepts = (ConceptSpec("one"), ConceptSpec("two"))

    def probabilities(self, images):
        return images[:, 0, 0, :2]


class Echo:
    """A generator whose pictures hold the latent."""

    def synthesise(self, latents):
        return latents.codes[:, None, None]


def test_latents_are_sorted_by_every_concept(gan):
    codes = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    latents = gan.draw(200, 0).moved(codes)
    found = sort_latents(Echo(), Known(), latents, bearing=0.7, clear=0.6)
    rows = {
        "forget": [n for n in range(200) if codes[n, 0] > 0.7 or codes[n, 1] > 0.7],
        "retain": [n for n in range(200) if codes[n, 0] < 0.6 and codes[n, 1] < 0.6],
    }
    for name, expected in rows.items():
        assert found.records[name].ids.tolist() == expected
        assert torch.equal(found.records[name].extra["probability"], codes[expected, :2])
    assert found.prevalence["two"] == pytest.approx(float((codes[:, 1] > 0.5).double().mean()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c * 0, "in 0 % of 50 pictures"),
        (lambda c: c * 0 + 1, "nothing to keep"),
        (lambda c: torch.where(torch.arange(50)[:, None] < 40, 0.6, 0.1 * c + 0.3), "too few"),
    ],
)
def test_what_is_never_or_always_drawn_is_refused(gan, change, message):
    codes = change(torch.rand(50, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(RequestError, match=message):
        sort_latents(Echo(), Known(), gan.draw(50, 0).moved(codes), bearing=0.5, clear=0.2)


# ---- ClipDirection ------------------------------------------------------------------------------


def test_the_direction_loss_is_its_formula(make):
    method = prepared(make(ClipDirection, kappa=math.inf, lr=1e-2), steps=2)
    given = batch(method)
    found = method.losses(given)
    bearing, clear = (method.drawn(given[name]) for name in ("forget", "retain"))
    embed = method.guide.embed
    with torch.no_grad():
        new, old = method.model.synthesise(bearing), method.original.synthesise(bearing)
        change = embed(new) - embed(old)
        d = method.guide.anchors[0] - method.guide.targets[0]
        unit = change / (change.norm(dim=1, keepdim=True) + 1e-3)
        forget = (1 - unit @ (d / d.norm())).mean()
        drift = method.model.synthesise(clear) - method.original.synthesise(clear)
        retain = 10 * 4 * drift.square().mean()
    assert float(found["forget"]) == pytest.approx(float(forget), abs=1e-5)
    assert float(found["retain"]) == pytest.approx(float(retain), rel=1e-4)


def test_the_direction_loss_begins_at_one_where_nothing_has_changed_yet(make):
    method = make(ClipDirection, kappa=math.inf)
    method._sort()
    method.prepare()
    assert float(method.losses(batch(method))["forget"]) == pytest.approx(1, abs=1e-4)


def test_pictures_that_are_clear_by_kappa_are_pushed_no_further(make):
    method = make(ClipDirection, kappa=-1e9)
    method._sort()
    method.prepare()
    assert float(method.losses(batch(method))["forget"]) == 0


def test_training_lowers_what_the_guide_sees_along_the_direction(make):
    method = make(ClipDirection, lr=1e-2, retain_weight=1.0)
    result = run_method(method, 10, progress=False)
    latents = method.records["forget"].latents
    before, after = (
        float(guide_probabilities(model, method.guide, latents).mean())
        for model in (method.original, result)
    )
    assert after < before - 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "picture"}, "`reference` is 'picture'"),
        ({"kappa": math.nan}, "`kappa` is nan"),
        ({"mapper_steps": 0}, "`mapper_steps` is 0"),
    ],
)
def test_bad_settings_of_the_direction_are_refused(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(ClipDirection, **settings)


# ---- ClipRepulsion ------------------------------------------------------------------------------


def test_repulsion_trains_on_all_latents_and_is_a_control(clip, gan):
    few = {"pool": 64, "bearing": 0.5, "clear": 0.5, "batch_size": 4}
    method = ClipRepulsion(gan, ConceptSpec("white"), clip, ["pink"], **few)
    prepared(method)
    assert ClipRepulsion.control
    assert len(method.records["forget"]) == 64
    given = batch(method)
    with torch.no_grad():
        images = method.model.synthesise(method.drawn(given["forget"]))
        expected = F.cosine_similarity(method.guide.embed(images), method.guide.targets[:1]).mean()
    found = method.losses(given)
    assert list(found) == ["forget"]
    assert float(found["forget"]) == pytest.approx(float(expected), abs=1e-5)


# ---- LatentNegation -----------------------------------------------------------------------------


def test_negated_latents_lie_at_the_mean_projection_of_the_clear_ones(make):
    method = prepared(make(LatentNegation, separability=0.0))
    forget, retain = method.records["forget"], method.records["retain"]
    v = forget.latents.codes.mean(0) - retain.latents.codes.mean(0)
    v = v / v.norm()
    threshold = (retain.latents.codes @ v).mean()
    given = forget[list(range(len(forget)))]
    codes = given["codes"] - torch.relu(given["codes"] @ v - threshold)[:, None] * v
    expected = method.original.pictures(method.drawn(given).moved(codes))
    assert torch.allclose(method.negated(given), expected, atol=1e-5)
    assert float((codes @ v).max()) <= float(threshold) + 1e-5


def test_directions_can_lie_among_the_styles(clip):
    torch.manual_seed(0)
    args = {"latent_size": 8, "style_size": 8, "channels": (8, 4), "mapping_layers": 2}
    model = ImageGAN("stylegan2", args)
    method = LatentNegation(model, ConceptSpec("white"), clip, ["pink"], space="w", gate="guide")
    method._directions, method._thresholds = torch.eye(8)[2:3], torch.tensor([0.1])
    latents = model.draw(6, 0)
    styles = model.mapped(latents, "w")
    given = {"codes": latents.codes, "probability": torch.tensor([[0.9]] * 5 + [[0.1]])}
    expected = styles.codes.detach().clone()
    expected[:5, 2] = expected[:5, 2].clamp(max=0.1)
    drawn = model.synthesise(styles.moved(expected))
    assert torch.allclose(method.negated(given), drawn, atol=1e-5)
    assert bool((expected != styles.codes).any())


def test_a_feature_that_no_plane_separates_is_refused_with_its_area(make):
    method = make(LatentNegation, separability=1.0)
    with pytest.raises(RequestError, match=r"area under the ROC curve 0\.\d\d, at least 1"):
        run_method(method, 1, progress=False)


def test_the_projection_alone_can_decide_what_changes(make):
    method = prepared(make(LatentNegation, separability=0.0, gate="projection"))
    over = method.records["forget"].latents.codes @ method._directions[0]
    under = method.records["retain"].latents.codes @ method._directions[0]
    assert float(over.min()) > float(method._thresholds[0]) >= float(under.max())
    assert len(over) + len(under) == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "w"}, "`space` is 'w'"),
        ({"gate": "judge"}, "`gate` is 'judge'"),
        ({"separability": 1.2}, "`separability` is 1.2"),
    ],
)
def test_bad_settings_of_the_negation_are_refused(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(LatentNegation, **settings)


# ---- AnchorDistillation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anchored(clip, gan):
    """A method after one plain and one adversarial step."""
    few = FEW | {"pool": 32, "anchor_steps": 10, "anchor_lr": 0.5, "mapper_steps": 0}
    concept = ConceptSpec("white")
    method = AnchorDistillation(gan, concept, clip, ["pink"], adversarial=True, lr=5e-3, **few)
    run_method(method, 2, progress=False)
    return method


def test_anchors_are_free_of_the_concept_that_their_latents_show(anchored):
    records = anchored.records["forget"]
    assert anchored.anchors["found"] == len(records) >= 8
    for codes, free in ((records.latents.codes, False), (records.extra["anchor"], True)):
        seen = guide_probabilities(anchored.original, anchored.guide, records.latents.moved(codes))
        assert bool((seen < 0.5).all()) == free


def test_the_anchor_is_the_first_place_that_is_clear_enough(make, monkeypatch):
    method = make(AnchorDistillation, mapper_steps=0, anchor_lr=0.15)
    latents = method.pool()[:2]
    method._original = (Echo(),)
    # log P falls by 10 per unit of the first number, so that it reaches -6 at 0.6; Adam's steps are
    # 0.15 long as long as the slope stays the same.
    monkeypatch.setattr(method, "_presence", lambda images: -10 * images[:, 0, 0, 0])
    codes = torch.zeros(2, 8)
    codes[:, 0] = torch.tensor([0.05, 0.5])  # four steps away, and one
    found = method.anchor(latents.moved(codes))
    assert found[:, 0].tolist() == pytest.approx([0.65, 0.65], abs=2e-3)
    assert float(found[:, 1:].abs().max()) == 0
    already = codes + 0.7
    assert torch.equal(method.anchor(latents.moved(already)), already)


def test_an_anchor_does_not_depend_on_its_neighbours(make):
    method = make(AnchorDistillation, mapper_steps=0, anchor_steps=2)
    latents = method.pool()[:3]
    alone = torch.cat([method.anchor(latents[n : n + 1]) for n in range(3)])
    assert torch.allclose(method.anchor(latents), alone, atol=1e-4)


def test_a_concept_with_an_anchor_of_its_own_goes_there(clip, gan):
    concept = ConceptSpec("white", anchor="pink")
    few = FEW | {"mapper_steps": 0}
    method = AnchorDistillation(gan, concept, clip, ["pink", "red"], **few)
    images = gan.pictures(gan.draw(3, 0))
    guide = ConceptGuide(clip, [ConceptSpec("pink")], {"pink": ["white", "red"]})
    expected = (1 - guide.probabilities(images)[:, 0]).log()
    assert torch.allclose(method._presence(images), expected, atol=1e-4)


def test_adversarial_latents_show_more_of_the_concept_and_keep_their_norm(anchored):
    given = anchored.records["forget"][list(range(8))]
    latents = anchored.drawn(given)
    found = anchored._ascended(given, latents)
    norms = [codes.norm(dim=1) for codes in (latents.codes, found.codes)]
    assert torch.allclose(*norms, rtol=1e-4)
    before, after = (
        guide_probabilities(anchored.model, anchored.guide, one).mean() for one in (latents, found)
    )
    assert float(after) > float(before)
    assert all(p.grad is None for p in anchored.original.parameters())


def test_training_brings_pictures_closer_to_those_of_the_anchors(anchored):
    records = anchored.records["forget"]
    target = anchored.original.pictures(records.latents.moved(records.extra["anchor"]))
    before, after = (
        float((model.pictures(records.latents) - target).square().mean())
        for model in (anchored.original, anchored.model)
    )
    assert after < before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor_steps": 0}, "anchor_steps"),
        ({"anchor_lr": 0.0}, "`anchor_lr` is 0.0"),
        ({"ascent": -1.0}, "`ascent` is -1.0"),
        ({"mapper_steps": -1}, "`mapper_steps` is -1"),
    ],
)
def test_bad_settings_of_the_anchors_are_refused(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(AnchorDistillation, **settings)
