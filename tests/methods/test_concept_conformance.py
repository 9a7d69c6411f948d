"""The conformance table of the methods that erase named concepts."""

from __future__ import annotations

import dataclasses

import pytest

from mmforget.methods.concept_ablation import ConceptAblation
from mmforget.methods.concept_salun import ConceptSalUn
from mmforget.methods.esd import ESD
from mmforget.methods.rece import RECE
from mmforget.methods.sld import SLD
from mmforget.methods.uce import UCE
from mmforget.testing.concept_conformance import ConceptMethodChecks

SHORT = {"steps": 3, "lr": 1e-3, "batch_size": 3, "retain_batch_size": 3}
BANK = SHORT | {"trajectories": 3}
MADE = SHORT | {"pictures": 3, "times": 3}

# For the digit world: 12 sampling steps, and all other digits and inks preserved.
DIGITS = {"steps": 12, "batch_size": 6, "retain_batch_size": 8}
DIGIT_BANK = DIGITS | {"trajectories": 8, "retain_trajectories": 30}
DIGIT_MADE = DIGITS | {"guidance": 3.0, "pictures": 16, "retain_pictures": 30}
# Between `strong` and `max`, for 12 instead of 50 sampling steps.
SELECTIVE = {"preset": "strong", "scale": 5000.0, "threshold": 0.1}


def in_two_words(concept):
    # A prompt that equals the words of the guidance is not led away from.
    return dataclasses.replace(concept, synonyms=("7",))


# One row per method: settings for the mechanics, and settings that erase a digit.
ROWS = {
    "UCE": ConceptMethodChecks(UCE),
    "RECE": ConceptMethodChecks(RECE),
    "ESD-x": ConceptMethodChecks(
        lambda m, c: ESD(m, c, **BANK),
        lambda m, c: ESD(m, c, **(DIGIT_BANK | {"lr": 1e-3})),
        effect_steps=80,
    ),
    "ESD-x-strict": ConceptMethodChecks(
        lambda m, c: ESD(m, c, weights="x-strict", **BANK),
        lambda m, c: ESD(m, c, weights="x-strict", **(DIGIT_BANK | {"lr": 1e-3})),
        effect_steps=100,
    ),
    "ESD-u": ConceptMethodChecks(
        lambda m, c: ESD(m, c, weights="u", **BANK),
        lambda m, c: ESD(m, c, weights="u", **(DIGIT_BANK | {"lr": 3e-4})),
        effect_steps=100,
    ),
    "ESD-lora": ConceptMethodChecks(
        lambda m, c: ESD(m, c, lora_rank=2, **BANK),
        lambda m, c: ESD(m, c, lora_rank=4, **(DIGIT_BANK | {"lr": 3e-3})),
        effect_steps=100,
    ),
    "ConceptAblation": ConceptMethodChecks(
        lambda m, c: ConceptAblation(m, c, **MADE),
        lambda m, c: ConceptAblation(m, c, **(DIGIT_MADE | {"lr": 2e-3})),
        effect_steps=100,
    ),
    "ConceptSalUn": ConceptMethodChecks(
        lambda m, c: ConceptSalUn(m, c, weight_decay=0.1, **MADE),
        lambda m, c: ConceptSalUn(
            m, c, pseudo="the digit three", **(DIGIT_MADE | {"lr": 1e-3, "batch_size": 8})
        ),
        effect_steps=100,
    ),
    # Guidance leads away from more than the concept: about half of the pictures lose their ink,
    # while noise would lose more than 0.8.
    "SLD": ConceptMethodChecks(
        lambda m, c: SLD(m, c, preset="max"),
        lambda m, c: SLD(m, in_two_words(c), warmup=1, **SELECTIVE),
        retain_drop=0.6,
    ),
}
# Training on a real, if small, generator takes 10 to 30 seconds.
EFFECTS = [pytest.param(row, marks=[] if row == "UCE" else pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize("check", [n for n in ConceptMethodChecks.names() if n != "effect"])
@pytest.mark.parametrize("row", ROWS)
def test_mechanics(row, check):
    ROWS[row].run(check)


@pytest.mark.parametrize("row", EFFECTS)
def test_effect(row):
    ROWS[row].run("effect")


def test_a_method_that_does_nothing_fails():
    nothing = DIGITS | {"lr": 1e-12, "trajectories": 1, "retain_weight": 0.0}
    checks = ConceptMethodChecks(lambda m, c: ESD(m, c, **nothing), effect_steps=1, pictures=1)
    with pytest.raises(AssertionError, match="does not erase"):
        checks.run("effect")


def test_a_method_that_ruins_the_pictures_fails():
    checks = ConceptMethodChecks(Noise, pictures=1)
    with pytest.raises(AssertionError, match="does not retain"):
        checks.run("effect")


class Noise(SLD):
    """Erases everything: its denoiser answers nothing but zero."""

    edits_weights = True

    def edit(self):
        for parameter in self.model.network.conv_out.parameters():
            parameter.zero_()
