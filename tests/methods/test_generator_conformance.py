"""The conformance table of the methods that make the generator of a GAN forget."""

from __future__ import annotations

import functools

import pytest

from mmforget.methods.adapt_then_unlearn import AdaptThenUnlearn
from mmforget.methods.anchor_distillation import AnchorDistillation
from mmforget.methods.class_distillation import ClassDistillation
from mmforget.methods.class_rerouting import ClassRerouting
from mmforget.methods.clip_direction import ClipDirection
from mmforget.methods.clip_repulsion import ClipRepulsion
from mmforget.methods.identity_unlearning import IdentityUnlearning
from mmforget.methods.latent_negation import LatentNegation
from mmforget.methods.parameter_extrapolation import ParameterExtrapolation
from mmforget.methods.text_to_unlearn import TextToUnlearn
from mmforget.methods.unit_ablation import UnitAblation
from mmforget.testing.generator_conformance import GeneratorMethodChecks, tiny_gan

Checks = GeneratorMethodChecks
CLASSES = functools.partial(tiny_gan, classes=True)
ADVERSARIAL = functools.partial(tiny_gan, discriminator=True)

ROWS = {
    "AdaptThenUnlearn": Checks(
        AdaptThenUnlearn, {"copies": 1, "adapt_steps": 2}, model=ADVERSARIAL
    ),
    "AnchorDistillation": Checks(AnchorDistillation),
    "AnchorDistillation-adversarial": Checks(AnchorDistillation, {"adversarial": True}),
    "ClassDistillation": Checks(ClassDistillation, model=CLASSES),
    "ClassRerouting": Checks(ClassRerouting, model=CLASSES),
    "ClipDirection": Checks(ClipDirection),
    "ClipDirection-mapper": Checks(ClipDirection, {"reference": "mapper"}),
    "ClipRepulsion": Checks(ClipRepulsion, {"retain_weight": 1.0}, effect_steps=60),
    "IdentityUnlearning": Checks(IdentityUnlearning),
    "LatentNegation": Checks(
        LatentNegation, {"separability": 0.0}, {"pool": 2048}, effect_steps=200, target="red"
    ),
    "ParameterExtrapolation": Checks(ParameterExtrapolation, model=ADVERSARIAL),
    "TextToUnlearn": Checks(TextToUnlearn),
    "UnitAblation": Checks(UnitAblation, {"units": 2}),
}
MECHANICS = [name for name in Checks.names() if name != "effect"]


def cases():
    """All rows and checks; the quick tier has one method that trains and one that does not."""
    for row in ROWS:
        for check in MECHANICS:
            quick = row == "TextToUnlearn" or (row == "UnitAblation" and check != "processes")
            marks = [] if quick or check == "capabilities" else [pytest.mark.slow]
            yield pytest.param(row, check, marks=marks, id=f"{row}-{check}")


@pytest.mark.parametrize(("row", "check"), cases())
def test_mechanics(row, check):
    ROWS[row].run(check)


@pytest.mark.slow
def test_a_feature_is_erased_and_the_rest_kept():
    ROWS["LatentNegation"].run("effect")


@pytest.mark.slow
def test_a_baseline_that_destroys_the_rest_is_found_out():
    with pytest.raises(AssertionError, match="does not retain"):
        ROWS["ClipRepulsion"].run("effect")


def test_a_method_that_does_nothing_is_found_out():
    checks = Checks(ClipDirection, {"lr": 1e-30})
    with pytest.raises(AssertionError, match="draws the pictures of the original"):
        checks.run("saving")
