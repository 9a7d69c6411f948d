"""Judges: models that say what is to be seen in a generated picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmforget.errors import MissingFileError, ModelError

SHIPPED_JUDGE = "digit_world"


@runtime_checkable
class Judge(Protocol):
    """Reads facts from pictures. It must not share weights with the model that made them."""

    factors: Mapping[str, tuple[str, ...]]
    """Per factor, such as ``digit``, its possible values in the order of the probabilities."""

    accuracy: Mapping[str, float]
    """Per factor, the share of real pictures that is read correctly; empty if it is unknown."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return per factor (B, K) probabilities for images (B, 3, H, W) in [0, 1]."""
        ...


class ClassifierJudge:
    """A classifier whose outputs are the values of several factors, one after another.

    Args:
        classifier: a model with `logits`, such as `ImageClassifier`.
        factors: per factor its values; together as many as the classifier has outputs.
        accuracy: per factor, measured on real pictures.
        batch_size: pictures at a time.

    Raises:
        ModelError: the numbers do not fit.
    """

    def __init__(
        self,
        classifier: Any,
        factors: Mapping[str, Sequence[str]],
        accuracy: Mapping[str, float] | None = None,
        batch_size: int = 256,
    ) -> None:
        self.classifier = classifier.eval()
        self.factors = {name: tuple(values) for name, values in factors.items()}
        self.accuracy = dict(accuracy or {})
        self.batch_size = batch_size
        wanted = sum(len(values) for values in self.factors.values())
        if wanted != classifier.num_classes:
            raise ModelError(
                f"the judge's factors have {wanted} values, but its classifier has "
                f"{classifier.num_classes} outputs; name every output once"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Judge`."""
        logits = torch.cat(
            [self.classifier.logits({"image": part}) for part in images.split(self.batch_size)]
        )
        parts = logits.split([len(values) for values in self.factors.values()], dim=1)
        return {name: part.softmax(1) for name, part in zip(self.factors, parts, strict=True)}


def load_judge(source: str | Path = SHIPPED_JUDGE) -> ClassifierJudge:
    """Load a classifier folder whose ``training.json`` names factors and accuracies.

    Args:
        source: the folder, or ``digit_world`` for the judge that is shipped.

    Raises:
        MissingFileError: there is no such folder.
    """
    from mmforget.models.classifier import load_classifier

    if source == SHIPPED_JUDGE:
        source = Path(str(resources.files("mmforget") / "assets" / "digit_world" / "judge"))
    file = Path(source) / "training.json"
    if not file.is_file():
        raise MissingFileError(
            f"the judge '{source}' has no training.json with its `factors`; give such a folder "
            f"or '{SHIPPED_JUDGE}'"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    return ClassifierJudge(
        load_classifier(Path(source)), record["factors"], record.get("test_accuracy")
    )
