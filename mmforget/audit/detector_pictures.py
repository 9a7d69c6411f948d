"""Pictures with boxes for the report: what is labelled, and what each model finds."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmforget.audit.detector_scene import DetectorScene, Part
from mmforget.audit.scene import draw

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 480
"""Longer side of a picture in pixels, about: small scenes are enlarged by whole numbers."""

GONE, KEPT = (193, 57, 24), (24, 92, 176)
"""Colours of boxes of forgotten and of all other classes."""

MOST_BOXES = 25
"""Boxes drawn in one picture; the most confident ones."""

CROWDED = 8
"""With more boxes than that, only those of forgotten classes are named: names would hide it all."""

SHOWN_ROLES = ("original", "unlearned", "retrained")
"""Controls would crowd them out."""


def pictures(scene: DetectorScene) -> list[dict[str, Any]]:
    """Choose images and draw the boxes of every model on them.

    Images with a forgotten object and no other, images with both kinds, both drawn at random, and
    the retained images in which the confidence in labelled objects changed most from the original
    to the first unlearned model.

    Returns:
        See `Results.examples`.
    """
    count, seed = scene.settings.examples, scene.settings.seed
    gone = scene.seen("forgotten")
    if not count or not scene.has(gone):
        return []
    rows = []
    part = scene.parts[gone]
    mixed = np.zeros(len(part.data), dtype=bool)
    if scene.has("test_retain_beside"):
        mixed = np.isin(part.data.ids, scene.parts["test_retain_beside"].data.ids)
    for kind, chosen in (("boxes_forgotten", ~mixed), ("boxes_both", mixed)):
        places = np.flatnonzero(chosen)
        places = places[draw(len(places), count, seed, kind)]
        rows += [_row(scene, kind, part, int(place)) for place in places]
    if scene.has("test_retain"):
        part = scene.parts["test_retain"]
        if scene.has("test_retain_apart"):
            part = scene.parts["test_retain_apart"]
        split = "test_retain_apart" if scene.has("test_retain_apart") else "test_retain"
        most = np.argsort(-changes(scene, split), kind="stable")[:count]
        rows += [_row(scene, "boxes_changed", part, int(place)) for place in most]
    return rows


def changes(scene: DetectorScene, split: str) -> np.ndarray:
    """(N,) summed change of the best score on each labelled object, original to unlearned."""
    unlearned = scene.by_role("unlearned")[0].entry.name
    first, last = (scene.fates(name, split) for name in (scene.original, unlearned))
    return np.bincount(
        first.image, np.abs(first.own - last.own), minlength=len(scene.parts[split].data)
    )


def _row(scene: DetectorScene, kind: str, part: Part, place: int) -> dict[str, Any]:
    sample = int(part.data.ids[place])
    whole: Any = scene.test if part.stage == "test" else part.data
    position = int(np.flatnonzero(whole.ids == sample)[0])
    item = whole[[position]]
    height, width = item["extent"][0].tolist()
    image = item["image"][0, :, :height, :width]
    boxes, labels, _ = whole.objects(position)
    labels = labels.tolist()
    names = [f"{'no ' if not labels else ''}objects"]
    if labels:
        names = list(dict.fromkeys(scene.class_names[label] for label in labels))
    images = {}
    for one in scene.models:
        if one.entry.role in SHOWN_ROLES:
            split = "test" if part.stage == "test" else scene.seen("forgotten")
            found = scene.predictions(one.entry.name, split)[position]
            chosen = found["scores"] >= scene.settings.score
            images[one.entry.name] = drawn(
                scene,
                image,
                found["boxes"][chosen][:MOST_BOXES],
                found["labels"][chosen][:MOST_BOXES].tolist(),
                found["scores"][chosen][:MOST_BOXES].tolist(),
            )
    return {
        "kind": kind,
        "id": sample,
        "prompt": ", ".join(names),
        "count": 1,
        "labelled": drawn(scene, image, torch.from_numpy(boxes), labels, []),
        "images": images,
    }


def drawn(
    scene: DetectorScene,
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int],
    scores: Sequence[float],
) -> str:
    """Base64 PNG of an image (3, H, W) with boxes (D, 4), their names and scores."""
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    height, width = image.shape[1:]
    scale = SIDE / max(height, width)
    scale = float(max(1, round(scale))) if scale > 1 else scale
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = Images.Resampling.NEAREST if scale >= 1 else Images.Resampling.LANCZOS
    canvas = Images.fromarray(pixels).resize(size, way)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    forgotten = set(scene.forgotten_classes)
    order = range(len(labels))
    for index in reversed(order):  # the most confident one is drawn last, on top
        colour = GONE if labels[index] in forgotten else KEPT
        left, top, right, bottom = (boxes[index] * scale).tolist()
        edges = (left, top, max(right, left + 1), max(bottom, top + 1))
        pen.rectangle(edges, outline=(255, 255, 255), width=4)
        pen.rectangle(edges, outline=colour, width=3)
    for index in reversed(order):
        colour = GONE if labels[index] in forgotten else KEPT
        if colour == KEPT and len(labels) > CROWDED:
            continue
        left, top, _, bottom = (boxes[index] * scale).tolist()
        text = scene.class_names[labels[index]]
        text += f" {scores[index]:.2f}" if scores else ""
        _label(pen, font, text, colour, (left, top, bottom), size)
    return _png(canvas)


def _label(
    pen: Any, font: Any, text: str, colour: Any, place: tuple[float, float, float], size: Any
) -> None:
    """A text on its own ground above the box, or within it where there is no room."""
    left, top, bottom = place
    length, height = pen.textlength(text, font=font) + 6, 18
    x = min(max(0.0, left), max(0.0, size[0] - length))
    y = top - height if top >= height else min(bottom, size[1] - height)
    pen.rectangle((x, y, x + length, y + height), fill=colour)
    pen.text((x + 3, y), text, fill=(255, 255, 255), font=font)


def _png(canvas: Image) -> str:
    """Photographs have too many colours for a page with dozens of them."""
    buffer = io.BytesIO()
    canvas.quantize(colors=128).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
