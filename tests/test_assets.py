"""The shipped checkpoints are what their notes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmforget
from mmforget import DigitWorld, ForgetRequest, load_classifier
from mmforget.audit.protocol import accuracies
from mmforget.data.digit_world import DIGITS, INKS, DigitFacts, facts
from mmforget.metrics.judge import load_judge
from mmforget.models.diffusion import load_generator

ASSETS = Path(mmforget.__file__).parent / "assets" / "digit_world"


def on_test_data(name: str) -> dict[str, tuple[float, int]]:
    data = DigitWorld()
    data.request(ForgetRequest(classes=("three", "seven")))
    rows = accuracies(load_classifier(ASSETS / name), data)
    return {row["split"]: (row["accuracy"], row["n"]) for row in rows}


def test_the_original_reads_unseen_strokes():
    found = on_test_data("classifier_vit")
    right = sum(accuracy * n for accuracy, n in found.values())
    assert right / sum(n for _, n in found.values()) > 0.97


@pytest.mark.parametrize("name", ["retrained_1", "retrained_2", "retrained_held_out"])
def test_retrained_models_never_answer_what_they_never_saw(name):
    found = on_test_data(name)
    assert found["forget"][0] == 0
    assert found["retain"][0] > 0.97


@pytest.mark.parametrize(
    "name", ["classifier_vit", "retrained_1", "retrained_2", "retrained_held_out"]
)
def test_notes_of_the_classifiers(name):
    found = on_test_data(name)
    for split, noted in note(name)["test_accuracy"].items():
        assert found[split] == pytest.approx((noted["accuracy"], noted["n"]), abs=2e-3)


def test_the_judge_reads_unseen_strokes():
    judge, images, facts = load_judge(), *real_pictures()
    seen = judge(images)
    for factor, noted in note("judge")["test_accuracy"].items():
        wanted = [judge.factors[factor].index(getattr(row, factor)) for row in facts]
        right = (seen[factor].argmax(1) == torch.tensor(wanted)).float().mean().item()
        # The note is of four other drawings of each of these strokes.
        assert right == pytest.approx(noted, abs=0.02)
        assert noted > 0.97


@pytest.mark.parametrize("name", ["diffusion_unet", "diffusion_transformer"])
def test_the_generators_draw_what_they_are_told(name):
    noted = note(name)["judged"]["rates"]
    assert min(noted["digit"], noted["ink"], noted["background"]) > 0.9
    model, judge = load_generator(ASSETS / name, steps=12), load_judge()
    wanted = list(zip(DIGITS, list(INKS) + list(INKS), strict=False))
    seen = judge(model.generate([f"a {ink} {digit}" for digit, ink in wanted], n=2, seed=7))
    digits = [judge.factors["digit"][i] for i in seen["digit"].argmax(1)]
    inks = [judge.factors["ink"][i] for i in seen["ink"].argmax(1)]
    pairs = [pair for pair in wanted for _ in range(2)]
    assert sum(found == digit for found, (digit, _) in zip(digits, pairs, strict=True)) >= 16
    assert sum(found == ink for found, (_, ink) in zip(inks, pairs, strict=True)) >= 17


def test_a_retrained_generator_has_never_seen_a_seven():
    name = "diffusion_unet_without_seven"
    assert note(name)["left_out"] == "seven"
    model, judge = load_generator(ASSETS / name, steps=12), load_judge()
    seen = judge(model.generate(["a red seven", "a red three"], n=6, seed=7))["digit"].argmax(1)
    assert (seen[:6] == 7).sum() <= 2
    assert (seen[6:] == 3).sum() >= 4


@pytest.mark.parametrize("folder", sorted(ASSETS.iterdir()), ids=lambda folder: folder.name)
def test_sizes(folder: Path):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4 * 2**20


def note(name: str) -> dict[str, Any]:
    return json.loads((ASSETS / name / "training.json").read_text())


def real_pictures() -> tuple[torch.Tensor, list[DigitFacts]]:
    data = DigitWorld().dataset("test")
    return data.images(np.arange(len(data))), facts(data.ids)


def test_the_detectors_find_what_their_notes_say() -> None:
    """On a part of the test scenes, so within what a part may differ by."""
    from mmforget import DigitScenes, load_detector
    from mmforget.audit.detector_outputs import role_precision

    data = DigitScenes(scenes=8, eval_scenes=80)
    data.request(*(ForgetRequest(classes=(digit,)) for digit in ("three", "seven", "five")))
    for name, seen in (("detector", True), ("detector_retrained", False)):
        found = {
            row["split"]: row["average_precision"]
            for row in role_precision(load_detector(ASSETS / name), data)
        }
        noted = note(name)["test_average_precision"]
        for split, value in found.items():
            assert value == pytest.approx(noted[split]["average_precision"], abs=0.12)
            known = seen or split == "retain"
            assert value > 0.7 if known else value < 0.25
        assert note(name)["forgotten"] == ([] if seen else ["three", "seven", "five"])
        weights = ASSETS / name / "model.safetensors"
        assert weights.stat().st_size < 4_000_000
