"""Questions for the report, with what every model answers to them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from torch import Tensor

from mmforget.audit.multimodal_rows import shares
from mmforget.audit.multimodal_scene import MultimodalScene
from mmforget.audit.scene import draw

SIDE = 96
"""Longer side of a picture in pixels, at most: reports hold dozens."""

KINDS = {
    "answers_forgotten": "forgotten",
    "answers_retain": "retain",
    "answers_harmless": "harmless_forgotten",
    "answers_both": "both_forgotten",
    "answers_text": "text_forgotten",
}
"""Kinds of examples, and the splits that they come from."""


def answers(scene: MultimodalScene) -> list[dict[str, Any]]:
    """Draw questions at random and put the answers of all models side by side.

    Of the retained ones half are those of which the first unlearned model lost the right answer, if
    there are any: a random sample rarely shows what went wrong.

    Returns:
        See `Results.examples`.
    """
    count, seed = scene.settings.examples, scene.settings.seed
    rows: list[dict[str, Any]] = []
    for kind, name in KINDS.items() if count else ():
        split = scene.judged if name == "forgotten" else f"test_{name}"
        if not scene.has(split):
            continue
        size = len(scene.parts[split].data)
        number = count if kind in ("answers_forgotten", "answers_retain") else (count + 1) // 2
        chosen = draw(size, number, seed, f"examples/{split}")
        if kind == "answers_retain":
            lost = _lost(scene, split)[: number // 2]
            rest = [place for place in chosen.tolist() if place not in lost]
            chosen = np.array([*lost, *rest][:number])
        rows += [_row(scene, kind, split, int(place)) for place in chosen]
    return rows


def _lost(scene: MultimodalScene, split: str) -> list[int]:
    """Records that the original answers rightly and the first unlearned model does not."""
    unlearned = scene.by_role("unlearned")[0].entry.name
    before, after = (
        shares(scene, name, split)["exact"].per_sample for name in (scene.original, unlearned)
    )
    return [row for row, (a, b) in enumerate(zip(before, after, strict=True)) if a and not b]


def _row(scene: MultimodalScene, kind: str, split: str, place: int) -> dict[str, Any]:
    data = scene.parts[split].data
    pictures = data.pictures([place])[0]
    return {
        "kind": kind,
        "id": int(data.ids[place]),
        "question": data.questions[place],
        "right": data.answers[place],
        "images": [small(picture) for picture in pictures[:4]],
        "answers": {
            name: [
                scene.said(name, split).answers[place],
                bool(shares(scene, name, split)["exact"].per_sample[place]),
            ]
            for name in scene.names
        },
    }


def small(picture: Tensor) -> str:
    """Base64 PNG of a uint8 picture (3, h, w), made smaller if it is large."""
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
