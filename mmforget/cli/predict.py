"""`mmforget predict`: a table with the predictions of a model for the test data."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmforget.cli.settings import EVALUATION_KEYS, checked_settings, shows_options

HELP = """
usage: mmforget predict [-c FILE] [options]

Writes a CSV file with one row per test image: its id, its class if known, the predicted class and
its probability; of a detector with one row per box: image, class, score and sides in pixels; of a
multimodal language model with one row per question: its id, the question, the answer, and the true
one.

options, all of them also as keys of the YAML file:
  -c, --config FILE       YAML file; options after it change single values
  --model MODEL           a folder, a hub id, shipped:NAME, or a class such as ImageClassifier
  --data DATA             class name (mmforget list data); --data.OPTION for its options
  --trainer.OPTION VALUE  Lightning's trainer: accelerator, precision, ...
  --out FILE              the table (default: predictions.csv); an existing file is not replaced
  --print_config          print the complete configuration and stop
  --help-all              every option of every part, from the classes themselves

examples:
  mmforget predict --model shipped:digit_world/classifier_vit --data DigitWorld
  mmforget predict --model runs/fit/weights --data DigitWorld --out before.csv
  mmforget predict --model runs/sevens/artifact --data DigitWorld --out after.csv
"""

COLUMNS = ("id", "label", "prediction", "probability")
BOX_COLUMNS = ("id", "prediction", "score", "left", "top", "right", "bottom")
"""One row per detection, in pixels; labelled boxes are in the data."""
ANSWER_COLUMNS = ("id", "question", "answer", "true_answer")
"""One row per question."""


def run(args: list[str]) -> int:
    """Predict.

    Raises:
        MMForgetError: the settings are wrong, or there is no such model.
    """
    settings = checked_settings("predict", args, (*EVALUATION_KEYS, "out"))
    return _run(args, settings)


def _run(args: list[str], settings: dict[str, Any]) -> int:
    from mmforget.artifacts.run_folder import atomic_write
    from mmforget.cli.train import TrainCLI
    from mmforget.errors import ConfigurationError, RunExistsError
    from mmforget.models.detector import Detector
    from mmforget.models.multimodal import MultimodalLM

    path = Path(str(settings.get("out") or "predictions.csv"))
    if path.exists() and not shows_options(settings):
        raise RunExistsError(f"the file '{path}' exists; choose another name with `--out`")
    cli = TrainCLI("predict", args, settings)
    if cli.trainer.world_size > 1:
        raise ConfigurationError(
            f"`mmforget predict` runs in one process, not {cli.trainer.world_size}; "
            "set `--trainer.devices 1`"
        )
    data = cli.datamodule.dataset("test")
    columns: tuple[str, ...] = COLUMNS
    rows_of = _answers
    if isinstance(cli.model, Detector):
        columns, rows_of = BOX_COLUMNS, _detections
    elif isinstance(cli.model, MultimodalLM):
        columns, rows_of = ANSWER_COLUMNS, _spoken
    batches: list[Any] = cli.trainer.predict(cli.model, cli.datamodule.loader(data)) or []
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(columns)
    rows = 0
    for batch in batches:
        for row in rows_of(batch, data):
            table.writerow(row)
            rows += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue())
    print(f"{rows} predictions: {path}")
    return 0


def _answers(batch: Mapping[str, Any], data: Any) -> Iterator[tuple[Any, ...]]:
    """One row per image of a classifier."""
    names = data.class_names
    labels = {} if data.labels is None else dict(zip(data.ids, data.labels, strict=True))
    top = batch["probability"].max(dim=1).values.tolist()
    found = zip(batch["id"].tolist(), batch["prediction"].tolist(), top, strict=True)
    for sample, prediction, probability in found:
        label = names[labels[sample]] if sample in labels else ""
        yield sample, label, names[prediction], f"{probability:.6f}"


def _detections(batch: Mapping[str, Any], data: Any) -> Iterator[tuple[Any, ...]]:
    """One row per detection, best first within an image."""
    names = data.class_names
    images = zip(
        batch["id"].tolist(), batch["boxes"], batch["scores"], batch["labels"], strict=True
    )
    for sample, boxes, scores, labels in images:
        rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        for box, score, label in rows:
            yield sample, names[label], f"{score:.6f}", *(f"{side:.2f}" for side in box)


def _spoken(batch: Mapping[str, Any], data: Any) -> Iterator[tuple[Any, ...]]:
    """One row per question."""
    place = {int(sample): row for row, sample in enumerate(data.ids)}
    truth = data.answers
    rows = zip(batch["id"].tolist(), batch["question"], batch["answer"], strict=True)
    for sample, question, answer in rows:
        yield sample, question, answer, truth[place[sample]]
