"""The shipped checkpoints are what their notes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmforget
from mmforget import DigitWorld, ForgetRequest, load_classifier
from mmforget.audit.protocol import accuracies

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


@pytest.mark.parametrize("folder", sorted(ASSETS.iterdir()), ids=lambda folder: folder.name)
def test_notes_and_sizes(folder: Path):
    note = json.loads((folder / "training.json").read_text())
    found = on_test_data(folder.name)
    for split, noted in note["test_accuracy"].items():
        assert found[split] == pytest.approx((noted["accuracy"], noted["n"]), abs=2e-3)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 2**20
