"""`forget`, `audit`, `fit`, `validate` and `predict` on detectors, in process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mmforget import load_detector
from mmforget.audit.results import Results
from mmforget.cli.main import main
from mmforget.models.base import state_hash
from mmforget.testing.tiny_detectors import tiny_detector

REPOSITORY = Path(__file__).parents[2]
DATA = (
    *("--data", "DigitScenes", "--data.scenes", "16", "--data.eval_scenes", "12"),
    *("--data.side", "64", "--data.batch_size", "4"),
)
TRAINER = (
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"),
)
QUICK = (
    *("--audit.replicates", "0", "--audit.relearning.steps", "2"),
    *("--audit.relearning.evaluate_every", "1", "--audit.relearning.evaluation_images", "4"),
    *("--audit.controls", "[logit_mask]"),
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An untrained detector of ten classes as a native folder."""
    folder = tmp_path_factory.mktemp("original")
    model = tiny_detector("rt_detr")
    model.save_native(folder)
    yield folder


@pytest.fixture(scope="module")
def run(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished and audited run of two requests."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    requests = "[{classes: [three]}, {classes: [seven], reason: asked for}]"
    argv = ["forget", "--model", str(original), "--method", "GSLoRA", *DATA, *TRAINER, *QUICK]
    argv += ["--request", requests, "--audit.retrained", f"[{original}]", "--run", str(folder)]
    assert main(argv) == 0
    yield folder


def test_a_sequence_leaves_a_complete_run(original: Path, run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"artifact", "config.yaml", "request.json", "results.json", "report.html"} <= names
    unlearned = load_detector(run / "artifact")
    assert state_hash(unlearned) != state_hash(load_detector(original))
    assert len(list((run / "artifact" / "adapters").iterdir())) == 2


def test_the_results_are_those_of_an_audit_of_detections(run: Path) -> None:
    results = Results.load(run)
    assert results.data["kind"] == "detection"
    assert [entry.role for entry in results.models] == [
        "original", "unlearned", "retrained", "control",
    ]  # fmt: skip
    rows = {(row.metric, row.split) for row in results.metrics if row.model == "unlearned"}
    for split in ("test_forget", "test_previous", "test_retain"):
        assert ("average_precision", split) in rows
    assert {row["split"] for row in results.sequence} == {"forget", "previous", "retain"}
    assert {row["step"] for row in results.sequence} == {0, 1, 2}
    config = (run / "config.yaml").read_text()
    assert "evaluation_images: 4" in config  # nested settings of the audit can be given singly
    assert "average precision" in (run / "report.md").read_text().lower()


def test_an_audit_of_its_own(original: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["audit", str(run / "artifact"), "--against", str(original), *DATA]
    argv += ["--request.classes", "[seven]", "--settings.replicates", "0", "--run", "again"]
    assert main([*argv, "--settings.relearning.steps", "0", "--controls"]) == 0
    assert "report:" in capsys.readouterr().out
    assert Results.load(Path("again")).data["kind"] == "detection"


def test_settings_of_other_audits_are_refused(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["forget", "--model", str(original), "--method", "GSLoRA", *DATA]
    argv += ["--request.classes", "[seven]", "--audit.neighbours", "3"]
    assert main(argv) == 2
    assert "neighbours" in capsys.readouterr().err


def test_a_detector_needs_scenes(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["forget", "--model", str(original), "--method", "GSLoRA", "--data", "DigitWorld"]
    argv += ["--data.strokes", "20", "--request.classes", "[seven]", "--run", "wrong"]
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert "boxes" in printed and printed.count("\n") <= 3
    assert not Path("wrong").exists()


def test_fit_and_validate_and_predict(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [*DATA, *TRAINER]
    argv = ["fit", "--model", str(original), *common, "--trainer.limit_val_batches", "0"]
    assert main([*argv, "--view", "retain", "--request.classes", "[seven]", "--run", "new"]) == 0
    assert json.loads(Path("new/weights/training.json").read_text())["cost"]["sample_passes"] > 0
    assert main(["validate", "--model", "new/weights", *common]) == 0
    assert "val/ap" in capsys.readouterr().out
    assert main(["predict", "--model", "new/weights", *common, "--out", "boxes.csv"]) == 0
    head, *rows = Path("boxes.csv").read_text().splitlines()
    assert head == "id,prediction,score,left,top,right,bottom"
    assert len({row.split(",")[0] for row in rows}) == 12
    assert all(0 <= float(side) <= 64 for row in rows for side in row.split(",")[3:])
    other = ["--data", "DigitWorld", "--data.strokes", "20"]
    assert main(["predict", "--model", "new/weights", *other, "--out", "none.csv"]) == 2
    assert "has no boxes" in capsys.readouterr().err


CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs" / "detector").glob("*.yaml")
    if "method:" in path.read_text()
)


def coco(folder: Path) -> Path:
    """Four grey pictures with a cell of each kind."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    names = ("RBC", "WBC", "Platelets")
    body = {
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(4)
        ],
        "annotations": [
            {
                "id": 10 * i + k, "image_id": i, "category_id": k + 1, "iscrowd": 0,
                "bbox": [2 + 20 * k, 5, 15, 20], "area": 300,
            }
            for i in range(4)
            for k in range(3)
        ],
    }  # fmt: skip
    for image in range(4):
        pixels = np.full((48, 64, 3), 40 * image, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{image}.png")
    for stage in ("train", "val", "test"):
        (folder / f"instances_{stage}.json").write_text(json.dumps(body))
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_take_a_step(
    path: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny model and few scenes in place of the real ones."""
    more = ["--model", str(original), "--data.batch_size", "4"]
    if path.stem.endswith("-bccd"):
        model = tiny_detector("rt_detr", num_classes=3)
        (tmp_path / "cells").mkdir()
        model.save_native(tmp_path / "cells")
        more[1] = str(tmp_path / "cells")
        more += ["--data.folder", str(coco(tmp_path / "data")), "--data.size", "[48, 64]"]
    else:
        more += ["--data.scenes", "16", "--data.eval_scenes", "4", "--data.side", "64"]
    assert main(["check", str(path), *more]) == 0
    assert f"'{path}' is fine" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_the_shipped_detector_finds_digits() -> None:
    from mmforget import DigitScenes

    data = DigitScenes(scenes=4, eval_scenes=24)
    batch = data.dataset("test")[list(range(24))]
    model = load_detector(REPOSITORY / "mmforget/assets/digit_world/detector")
    with torch.no_grad():
        found = model.detect(batch)
    there = [set(label[label >= 0].tolist()) for label in batch["label"]]
    seen = [set(one.above(0.3).labels.tolist()) for one in found]
    assert np.mean([one <= other for one, other in zip(there, seen, strict=True)]) > 0.8
