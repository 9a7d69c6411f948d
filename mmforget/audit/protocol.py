"""temporary: replaced within minutes"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmforget.audit.outputs import collect
from mmforget.data.base import ForgetDataModule, Stage
from mmforget.models.base import Model


def accuracies(
    model: Model, data: ForgetDataModule, stage: Stage = "test", batch_size: int = 256
) -> list[dict[str, Any]]:
    """Accuracy on the forget, retain and previously forgotten part of a stage.

    Args:
        model: offers `HasLogits`.
        data: with a request.
        stage: ``test`` or ``val``. For a request that names samples, the forget part of these is
            empty, and the training data stands in for it.
        batch_size: of the forward passes.

    Returns:
        One row per part that has samples: ``{"split", "accuracy" in [0, 1], "n"}``.
    """
    outputs = collect(model, data.dataset(stage), batch_size)
    rows = []
    for role in ("forget", "retain", "previous"):
        part = data.subset(stage, role, whole=True)
        found = outputs.of(part.ids) if len(part.ids) else None
        if found is None:
            part = data.subset("train", role, whole=True)
            if not len(part.ids):
                continue
            found = collect(model, part, batch_size)
        accuracy = float(np.mean(found.correct.numpy()))
        rows.append({"split": role, "accuracy": accuracy, "n": len(found)})
    return rows
