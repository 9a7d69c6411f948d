"""Digit scenes: several handwritten digits on one canvas, with boxes; needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ImageDataset, View
from mmforget.data.detection import (
    Annotations,
    DetectionDataModule,
    DetectionDataset,
    MixedImages,
)
from mmforget.data.digit_world import (
    BACKGROUNDS,
    DIGITS,
    INKS,
    WORLD_SEED,
    interpolation,
    stage_strokes,
    strokes,
)
from mmforget.data.hashing import uniform
from mmforget.data.split import STAGES, Stage
from mmforget.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALLEST, LARGEST = 14.0, 36.0
"""Side of the square in which a digit is drawn, in pixels."""

LEAST, MOST = 2, 5
"""Digits in one scene, as far as there is room."""

TRIES = 12
"""Places that are tried for each digit; it is left out if all of them touch another one."""

INKED = 0.2
"""A cell of a stroke counts as drawn from this amount of ink on; boxes end at drawn cells."""

STAGE_STEP = 1_000_000
"""Ids of scenes: number of the scene plus this for validation, and twice this for test."""


@dataclass(frozen=True)
class _Scenes:
    """What N scenes show: S slots each, of which `used` ones hold a digit.

    Attributes:
        stroke: (N, S) index of the handwritten digit.
        ink: (N, S) colour index.
        left, top, size: (N, S) place and side of the drawn squares, in pixels.
        used: (N, S) bool.
        background: (N,) colour index.
    """

    stroke: np.ndarray
    ink: np.ndarray
    left: np.ndarray
    top: np.ndarray
    size: np.ndarray
    used: np.ndarray
    background: np.ndarray


def _plan(ids: np.ndarray, chosen: np.ndarray, side: int) -> _Scenes:
    """Decide what scenes show, by their ids and the strokes that may be drawn."""

    def drawn(purpose: str, *keys: int) -> np.ndarray:
        return uniform(ids, WORLD_SEED, f"scene-{purpose}", *keys)

    wanted = LEAST + (drawn("count") * (MOST - LEAST + 1)).astype(np.int64)
    shape = (len(ids), MOST)
    left, top, used = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
    slots = range(MOST)
    stroke = chosen[np.stack([(drawn("stroke", s) * len(chosen)).astype(int) for s in slots], 1)]
    ink = np.stack([(drawn("ink", s) * len(INKS)).astype(int) for s in slots], 1)
    size = SMALLEST + np.stack([drawn("size", s) for s in slots], 1) * (LARGEST - SMALLEST)
    for slot in slots:
        for attempt in range(TRIES):
            open_ = (slot < wanted) & ~used[:, slot]
            x = drawn("left", slot, attempt) * (side - size[:, slot])
            y = drawn("top", slot, attempt) * (side - size[:, slot])
            free = np.ones(len(ids), dtype=bool)
            for other in range(slot):
                apart = (
                    (x >= left[:, other] + size[:, other])
                    | (left[:, other] >= x + size[:, slot])
                    | (y >= top[:, other] + size[:, other])
                    | (top[:, other] >= y + size[:, slot])
                )
                free &= apart | ~used[:, other]
            found = open_ & free
            left[found, slot], top[found, slot] = x[found], y[found]
            used[found, slot] = True
    background = (drawn("background") * len(BACKGROUNDS)).astype(int)
    return _Scenes(stroke, ink, left, top, size, used, background)


def _boxes(scenes: _Scenes) -> Annotations:
    """Boxes that end where the ink ends."""
    inked = strokes()[0] >= INKED

    def ends(axis: int) -> tuple[np.ndarray, np.ndarray]:
        there = np.asarray(inked.any(axis=axis))
        first, last = there.argmax(axis=1), 8 - there[:, ::-1].argmax(axis=1)
        return first[scenes.stroke] / 8, last[scenes.stroke] / 8

    (left, right), (top, bottom) = ends(1), ends(2)
    boxes = np.stack(
        [
            scenes.left + left * scenes.size,
            scenes.top + top * scenes.size,
            scenes.left + right * scenes.size,
            scenes.top + bottom * scenes.size,
        ],
        axis=2,
    )
    digit = strokes()[1][scenes.stroke]
    return Annotations.of(
        [
            (boxes[row][used], digit[row][used], np.zeros(int(used.sum()), dtype=bool))
            for row, used in enumerate(scenes.used)
        ]
    )


class SceneImages(DetectionDataset):
    """One stage of the scenes; drawn when they are first asked for.

    Args:
        name: of the data set.
        ids: (N,) ids of the scenes.
        chosen: indices of the strokes that may be drawn.
        side: of the canvas in pixels.
    """

    def __init__(self, name: str, ids: np.ndarray, chosen: np.ndarray, side: int) -> None:
        self._scenes = _plan(ids, chosen, side)
        # A mirrored two is no two.
        super().__init__(name, ids, _boxes(self._scenes), DIGITS, (3, side, side), flips="none")

    def read(self, rows: np.ndarray) -> Tensor:
        """Draw: each digit is scaled bilinearly and blends what is there into its ink."""
        plan, side = self._scenes, self.image_shape[1]
        inks = torch.tensor(list(INKS.values())).float()
        backgrounds = torch.tensor(list(BACKGROUNDS.values())).float()
        canvas = backgrounds[plan.background[rows]][:, :, None, None].expand(-1, -1, side, side)
        for slot in range(MOST):
            stroke = torch.from_numpy(strokes()[0][plan.stroke[rows, slot]])
            down = interpolation(plan.top[rows, slot], plan.size[rows, slot], side)
            across = interpolation(plan.left[rows, slot], plan.size[rows, slot], side)
            ink = (down @ stroke @ across.transpose(1, 2))[:, None]
            ink = ink * torch.from_numpy(plan.used[rows, slot])[:, None, None, None]
            canvas = torch.lerp(canvas, inks[plan.ink[rows, slot]][:, :, None, None], ink)
        return canvas.round().to(torch.uint8)


class DigitScenes(DetectionDataModule):
    """Scenes of up to five coloured handwritten digits that do not touch each other.

    Two to five are wanted in each scene; one that finds no free place in `TRIES` draws is left out.
    Digits are 14 to 36 pixels large. The strokes are those of `DigitWorld`: test scenes show
    handwriting that no training scene shows.

    Args:
        scenes: in training, 1 to 1,000,000.
        eval_scenes: in validation and again in test, 1 to 1,000,000.
        side: of the canvas in pixels, at least 48.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment,
            mixed_images: see `DetectionDataModule`. `augment` changes nothing: a mirrored digit is
            another one.

    Raises:
        DataError: a number out of range.
    """

    def __init__(
        self,
        scenes: int = 4000,
        eval_scenes: int = 400,
        side: int = 80,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
        mixed_images: MixedImages = "filter",
    ) -> None:
        super().__init__(
            batch_size,
            seed,
            num_workers,
            view,
            shots,
            missing_classes,
            retain_fraction,
            augment,
            mixed_images,
        )
        for name, value in (("scenes", scenes), ("eval_scenes", eval_scenes)):
            if not 1 <= value <= STAGE_STEP:
                raise DataError(f"`{name}` is {value}, it must be between 1 and {STAGE_STEP:,}")
        if side < 48:
            raise DataError(f"`side` is {side}, it must be at least 48")
        self.scenes, self.eval_scenes, self.side = scenes, eval_scenes, side

    def build(self) -> dict[Stage, ImageDataset]:
        """Decide what the scenes show; nothing is drawn yet."""
        chosen = stage_strokes()
        stages: dict[Stage, ImageDataset] = {}
        for number, stage in enumerate(STAGES):
            count = self.scenes if stage == "train" else self.eval_scenes
            ids = number * STAGE_STEP + np.arange(count)
            stages[stage] = SceneImages(
                f"digit_scenes/{stage}/{self.side}", ids, chosen[stage], self.side
            )
        return stages

    def to_huggingface(self, stage: Stage) -> Any:
        """Copy a stage into a Hugging Face data set.

        Returns:
            A `datasets.Dataset` with the columns ``image`` (PNG), ``image_id``, and ``objects``
            with ``bbox`` (left, top, width, height in pixels) and ``category`` (`ClassLabel`).
        """
        import datasets

        data = self._scenes(stage)
        marks = [data.objects(position)[:2] for position in range(len(data))]
        objects = [
            {
                "bbox": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist(),
                "category": labels.tolist(),
            }
            for boxes, labels in marks
        ]
        columns = {
            "image": list(data.pixels(np.arange(len(data))).permute(0, 2, 3, 1).numpy()),
            "image_id": data.ids.tolist(),
            "objects": objects,
        }
        box = datasets.List(datasets.Value("float32"), length=4)
        kind = datasets.ClassLabel(names=list(data.class_names))
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "image_id": datasets.Value("int64"),
                "objects": {"bbox": datasets.List(box), "category": datasets.List(kind)},
            }
        )
        return datasets.Dataset.from_dict(columns, features=features)
