"""Pictures for the report: what was forgotten, and the retained images that changed most."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from torch import Tensor

from mmforget.audit.scene import Scene, draw
from mmforget.metrics.output import js_divergence, probabilities


def pictures(scene: Scene) -> list[dict[str, Any]]:
    """Choose the pictures of a report and what every model says about them.

    The retained images are those whose answer moved most (Jensen-Shannon) from the original to the
    first unlearned model; the forgotten ones are drawn at random.

    Returns:
        See `Results.examples`.
    """
    count = scene.settings.examples
    if not count:
        return []
    forgotten, unlearned = scene.seen("forgotten"), scene.by_role("unlearned")[0].entry.name
    ids = scene.outputs(scene.original, forgotten).id.numpy()
    chosen = ids[draw(len(ids), count, scene.settings.seed, "examples")]
    before, after = (
        scene.outputs(name, "test_retain").logits for name in (scene.original, unlearned)
    )
    moved = js_divergence(before, after).numpy()
    most = np.argsort(-moved, kind="stable")[:count]
    changed = scene.outputs(scene.original, "test_retain").id.numpy()[most]
    return [
        *_rows(scene, "forgotten", forgotten, chosen),
        *_rows(scene, "most_changed_retained", "test_retain", changed),
    ]


def _rows(scene: Scene, kind: str, split: str, ids: np.ndarray) -> list[dict[str, Any]]:
    data = scene.dataset("test" if split.startswith("test") else "train")
    found = {name: scene.outputs(name, split) for name in scene.names}
    shares = {name: probabilities(outputs.logits) for name, outputs in found.items()}
    place = {int(sample): index for index, sample in enumerate(found[scene.original].id)}
    rows = []
    for sample in ids.tolist():
        position = int(np.flatnonzero(data.ids == sample)[0])
        item = data[position]
        rows.append(
            {
                "kind": kind,
                "id": sample,
                "label": scene.class_names[int(item["label"])],
                "image": png(item["image"]),
                "predictions": {
                    name: _answer(scene, values[place[sample]]) for name, values in shares.items()
                },
            }
        )
    return rows


def _answer(scene: Scene, shares: Tensor) -> list[Any]:
    return [scene.class_names[int(shares.argmax())], float(shares.max())]


def png(image: Tensor) -> str:
    """Base64 PNG of a (3, H, W) image in [0, 1]."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
