"""The digit world: real handwritten digits in colour, of which every fact is known."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ForgetDataModule, ImageDataset, View
from mmforget.data.hashing import uniform
from mmforget.data.split import STAGES, Stage, read_hashed
from mmforget.errors import DataError, MissingFileError, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence


DIGITS: tuple[str, ...] = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
INKS = {
    "red": (242, 64, 51),
    "green": (64, 217, 77),
    "blue": (89, 153, 255),
    "yellow": (255, 217, 51),
    "pink": (242, 115, 230),
    "white": (255, 255, 255),
}
BACKGROUNDS = {
    "black": (0, 0, 0),
    "maroon": (64, 13, 13),
    "forest": (8, 51, 20),
    "navy": (13, 20, 77),
    "plum": (51, 13, 64),
    "charcoal": (64, 64, 64),
}
"""RGB. Ink is always brighter than the background, so that a small network learns in minutes, and
the names of the two lists are disjoint, so that a word in a caption means one thing."""

CANVAS = 32
SMALLEST, LARGEST = 20.0, 28.0
"""Side of the drawn digit in pixels; position and size are continuous."""

VARIANTS = 1000
"""A sample id is ``stroke * VARIANTS + variant``."""

WORLD_SEED = 0
"""Facts of a sample depend on its id and on this, never on the seed of a run."""

SPLIT_FILE = "digit_world_split.json"


@dataclass(frozen=True)
class DigitFacts:
    """Everything there is to know about one image.

    Attributes:
        digit, ink, background: names.
        left, top, size: place and side of the drawn square, in pixels.
    """

    digit: str
    ink: str
    background: str
    left: float
    top: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the drawn square, in pixels."""
        return (self.left, self.top, self.left + self.size, self.top + self.size)

    @property
    def caption(self) -> str:
        """For example ``a red seven on a navy background``."""
        return f"a {self.ink} {self.digit} on a {self.background} background"


@dataclass(frozen=True)
class _Drawing:
    """Attributes of N samples as arrays (N,): colour indices, and pixels."""

    ink: np.ndarray
    background: np.ndarray
    left: np.ndarray
    top: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray) -> _Drawing:
        """Derive the attributes from the ids."""
        ink = (uniform(ids, WORLD_SEED, "ink") * len(INKS)).astype(np.int64)
        background = (uniform(ids, WORLD_SEED, "background") * len(BACKGROUNDS)).astype(np.int64)
        size = SMALLEST + uniform(ids, WORLD_SEED, "size") * (LARGEST - SMALLEST)
        left = uniform(ids, WORLD_SEED, "left") * (CANVAS - size)
        top = uniform(ids, WORLD_SEED, "top") * (CANVAS - size)
        return cls(ink, background, left, top, size)


@cache
def strokes() -> tuple[np.ndarray, np.ndarray]:
    """Read the 1,797 handwritten digits that come with scikit-learn, without importing it.

    Returns:
        Ink (1797, 8, 8) float32 in [0, 1], and digits (1797,) int64.

    Raises:
        MissingFileError: scikit-learn is not installed.

    Reference: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", 1998, UCI.
    """
    spec = importlib.util.find_spec("sklearn")
    folders = spec.submodule_search_locations if spec else None
    path = Path((folders or ["sklearn"])[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise MissingFileError(
            f"the digit world needs '{path}'; install scikit-learn (`pip install scikit-learn`)"
        )
    text = gzip.decompress(path.read_bytes()).decode().replace("\n", ",")
    table = np.fromstring(text, sep=",", dtype=np.float32).reshape(-1, 65)
    return table[:, :64].reshape(-1, 8, 8) / 16, table[:, 64].astype(np.int64)


def strokes_hash() -> str:
    """SHA-256 of the strokes and their digits."""
    ink, digit = strokes()
    levels = (ink * 16).astype(np.uint8)
    return hashlib.sha256(levels.tobytes() + digit.astype(np.uint8).tobytes()).hexdigest()


def stage_strokes(path: Path | None = None) -> dict[Stage, np.ndarray]:
    """Read the frozen assignment of strokes to stages.

    Args:
        path: split file; by default the one that is shipped.

    Raises:
        DataError: the file was changed, or belongs to other strokes than those installed.
    """
    path = path or Path(str(resources.files("mmforget") / "assets" / SPLIT_FILE))
    content = read_hashed(path)
    if content["strokes_sha256"] != strokes_hash():
        raise DataError(
            f"split file '{path}' belongs to other digits than the installed scikit-learn ships; "
            "run `scripts/freeze_splits.py`"
        )
    return {stage: np.array(content[stage], dtype=np.int64) for stage in STAGES}


def render(ids: np.ndarray) -> Tensor:
    """Draw samples: the stroke is scaled bilinearly and blends background into ink.

    Args:
        ids: (B,) sample ids.

    Returns:
        (B, 3, 32, 32) uint8.
    """
    drawing = _Drawing.of(ids)
    stroke = torch.from_numpy(strokes()[0][ids // VARIANTS])
    rows = interpolation(drawing.top, drawing.size)
    columns = interpolation(drawing.left, drawing.size)
    ink = (rows @ stroke @ columns.transpose(1, 2))[:, None]
    front = torch.tensor(list(INKS.values())).float()[drawing.ink][:, :, None, None]
    back = torch.tensor(list(BACKGROUNDS.values())).float()[drawing.background][:, :, None, None]
    return torch.lerp(back, front, ink).round().to(torch.uint8)


def interpolation(start: np.ndarray, size: np.ndarray, canvas: int = CANVAS) -> Tensor:
    """Weights (B, canvas, 8) of the eight stroke cells for every pixel along one axis.

    Args:
        start: (B,) where the drawn squares begin, in pixels.
        size: (B,) their sides in pixels.
        canvas: side of the canvas in pixels.
    """
    centre = np.arange(canvas) + 0.5
    source = (centre - start[:, None]) * (8 / size)[:, None] - 0.5
    distance = np.abs(source[:, :, None] - np.arange(8))
    return torch.from_numpy(np.clip(1 - distance, 0, None).astype(np.float32))


def facts(ids: np.ndarray) -> list[DigitFacts]:
    """Return all facts about samples, given their ids (N,)."""
    drawing, inks, backgrounds = _Drawing.of(ids), tuple(INKS), tuple(BACKGROUNDS)
    return [
        DigitFacts(DIGITS[digit], inks[ink], backgrounds[background], left, top, size)
        for digit, ink, background, left, top, size in zip(
            strokes()[1][ids // VARIANTS].tolist(),
            drawing.ink.tolist(),
            drawing.background.tolist(),
            drawing.left.tolist(),
            drawing.top.tolist(),
            drawing.size.tolist(),
            strict=True,
        )
    ]


class DigitImages(ImageDataset):
    """One stage of the digit world; images are drawn when they are first asked for.

    Args:
        name: of the data set.
        ids: (N,) sample ids.
        label: what the class is, the ``digit`` or the colour of the ``ink``.
    """

    def __init__(self, name: str, ids: np.ndarray, label: Literal["digit", "ink"]) -> None:
        labels, names = strokes()[1][ids // VARIANTS], tuple(DIGITS)
        if label == "ink":
            labels, names = _Drawing.of(ids).ink, tuple(INKS)
        # A mirrored two is no two.
        super().__init__(name, ids, labels, names, (3, CANVAS, CANVAS), flippable=False)
        self._all_ids = self.ids

    def read(self, rows: np.ndarray) -> Tensor:
        """Draw."""
        return render(self._all_ids[rows])


class DigitWorld(ForgetDataModule):
    """Coloured handwritten digits on 32x32 canvases; needs no download.

    The strokes are scikit-learn's 1,797 real digits, split into training, validation and test by a
    frozen file, so that test images show unseen handwriting. Each stroke is drawn several times
    with different colours, places and sizes.

    Args:
        variants: drawings per stroke in training, 1 to 1000.
        eval_variants: drawings per stroke in validation and test, 1 to 1000.
        label: what the class is, the ``digit`` or the colour of the ``ink``.
        strokes: use only this many strokes of every stage, balanced over the digits.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment: see
            `ForgetDataModule`.

    Raises:
        DataError: a number out of range.

    Example:
        >>> data = DigitWorld(strokes=20)
        >>> data.dataset("test").images(np.arange(4)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        variants: int = 8,
        eval_variants: int = 2,
        label: Literal["digit", "ink"] = "digit",
        strokes: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
    ) -> None:
        super().__init__(
            batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment
        )
        for name, value in (("variants", variants), ("eval_variants", eval_variants)):
            if not 1 <= value <= VARIANTS:
                raise DataError(f"`{name}` is {value}, it must be between 1 and {VARIANTS}")
        if strokes is not None and strokes < 1:
            raise DataError(f"`strokes` is {strokes}, it must be at least 1 or left out")
        if label not in ("digit", "ink"):
            raise DataError(f"`label` is '{label}', {suggest(label, ('digit', 'ink'))}")
        self.variants = variants
        self.eval_variants = eval_variants
        self.label: Literal["digit", "ink"] = label
        self.strokes = strokes

    def build(self) -> dict[Stage, ImageDataset]:
        """Derive ids and labels; nothing is drawn yet."""
        stages: dict[Stage, ImageDataset] = {}
        for stage, chosen in stage_strokes().items():
            chosen = _balanced(chosen, self.strokes)
            count = self.variants if stage == "train" else self.eval_variants
            ids = (chosen[:, None] * VARIANTS + np.arange(count)).reshape(-1)
            stages[stage] = DigitImages(f"digit_world/{stage}/{self.label}", ids, self.label)
        return stages

    def facts(self, id: int) -> DigitFacts:
        """Return all facts about a sample.

        Raises:
            DataError: the id names no stroke.
        """
        if not 0 <= id // VARIANTS < len(strokes()[1]):
            raise DataError(f"there is no sample {id}; ids are stroke * {VARIANTS} + variant")
        return facts(np.array([id]))[0]

    def caption(self, id: int) -> str:
        """Describe a sample, for example ``a red seven on a navy background``."""
        return self.facts(id).caption

    def to_huggingface(self, stage: Stage) -> Any:
        """Copy a stage into a Hugging Face data set.

        Returns:
            A `datasets.Dataset` with the columns ``image`` (PNG), ``label`` (`ClassLabel`),
            ``caption``, ``digit``, ``ink``, ``background``, ``box`` (left, top, right, bottom in
            pixels) and ``id``.
        """
        import datasets

        data = self.dataset(stage)
        assert data.labels is not None  # digits always have labels
        rows = facts(data.ids)
        columns: dict[str, Any] = {
            "image": list(data.pixels(np.arange(len(data))).permute(0, 2, 3, 1).numpy()),
            "label": data.labels.tolist(),
            "caption": [fact.caption for fact in rows],
            "digit": [fact.digit for fact in rows],
            "ink": [fact.ink for fact in rows],
            "background": [fact.background for fact in rows],
            "box": [list(fact.box) for fact in rows],
            "id": data.ids.tolist(),
        }
        text = datasets.Value("string")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=list(data.class_names)),
                "caption": text,
                "digit": text,
                "ink": text,
                "background": text,
                "box": datasets.Sequence(datasets.Value("float32"), length=4),
                "id": datasets.Value("int64"),
            }
        )
        return datasets.Dataset.from_dict(columns, features=features)


def _balanced(chosen: np.ndarray, limit: int | None) -> np.ndarray:
    """The first strokes of every digit, in turn, up to the limit."""
    if limit is None:
        return chosen
    digit = strokes()[1][chosen]
    turn = np.zeros(len(chosen), dtype=np.int64)
    for value in range(10):
        turn[digit == value] = np.arange((digit == value).sum())
    return np.asarray(np.sort(chosen[np.lexsort((digit, turn))[:limit]]))
