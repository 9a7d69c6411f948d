"""A detector with a translator in front of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, MissingFileError, WeightsError, suggest
from mmforget.models.base import Instances, LossParts
from mmforget.models.detector import Detector, load_detector
from mmforget.models.detectors.base import DetectionNetwork, Detections, Objects
from mmforget.models.translators import Translator
from mmforget.models.weights import put_weights, read_weights, write_weights

Goal = Literal["adapt", "suppress"]

NOTES: dict[str, str] = {
    "adapt": "adaptation, input side: the detector is unchanged, and whoever leaves out the "
    "translator has the detector as it was",
    "suppress": "suppression, input side: whoever leaves out the translator has the class back",
}
"""What every report says of a translated detector."""

DETECTOR_FOLDER = "detector"
SETTINGS_FILE = "translator.json"
WEIGHTS_FILE = "translator.safetensors"
EXPORT_FILE = "translator.pt2"


class TranslatedNetwork(DetectionNetwork):
    """A detection network that sees translated pictures; nothing of it changes.

    Args:
        kind: the network behind the common contract.
        translator: what its pictures go through.
    """

    def __init__(self, kind: DetectionNetwork, translator: Translator) -> None:
        super().__init__(kind.network)
        self.inner, self.translator = kind, translator
        self.num_classes, self.num_features = kind.num_classes, kind.num_features
        self.head_names, self.hidden_names = kind.head_names, kind.hidden_names

    def translated(self, images: Tensor, extent: Tensor) -> Tensor:
        """(B, 3, H, W) pictures in [0, 1], black beyond their true size as they were before."""
        rows = torch.arange(images.shape[-2], device=images.device) < extent[:, :1]
        columns = torch.arange(images.shape[-1], device=images.device) < extent[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(inside, self.translator(images), 0.0)

    def instances(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Instances:
        """See `DetectionNetwork.instances`."""
        return self.inner.instances(self.translated(images, extent), extent, objects)

    def losses(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> LossParts:
        """See `DetectionNetwork.losses`."""
        return self.inner.losses(self.translated(images, extent), extent, objects)

    def training_loss(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Tensor:
        """See `DetectionNetwork.training_loss`."""
        return self.inner.training_loss(self.translated(images, extent), extent, objects)

    def logits(self, images: Tensor, extent: Tensor) -> Tensor:
        """See `DetectionNetwork.logits`."""
        return self.inner.logits(self.translated(images, extent), extent)

    def detect(self, images: Tensor, extent: Tensor, most: int) -> list[Detections]:
        """See `DetectionNetwork.detect`."""
        return self.inner.detect(self.translated(images, extent), extent, most)

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """See `DetectionNetwork.class_rows`."""
        return self.inner.class_rows(classes)


class TranslatedDetector(Detector):
    """A detector that looks at every picture through a translator.

    Does all that a `Detector` does, with the translated picture; what it does not say itself, such
    as its class names, is the detector's. `detector` is that detector, untouched: using it directly
    is all that it takes to bypass the translator.

    Args:
        detector: stays as it is.
        translator: comes first.
        goal: what the translator was trained for, ``adapt`` or ``suppress``.

    Raises:
        ConfigurationError: there is no such goal.
    """

    detector: Detector
    translator: Translator

    def __init__(self, detector: Detector, translator: Translator, goal: Goal = "adapt") -> None:
        LightningModule.__init__(self)  # the one of `Detector` would build a network
        if goal not in get_args(Goal):
            raise ConfigurationError(f"`goal` is '{goal}', {suggest(goal, get_args(Goal))}")
        self.detector, self.translator = detector, translator
        self.goal: Goal = goal
        self._precision = {}

    def __getattr__(self, name: str) -> Any:
        """What this object lacks is the detector's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("detector"), name)

    def _wrap(self) -> None:
        """Nothing to keep: `kind` is made when it is asked for."""

    @property
    def kind(self) -> Any:
        """The network behind the common contract, with the translator in front."""
        return TranslatedNetwork(self.detector.kind, self.translator)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy both."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new

    @property
    def note(self) -> str:
        """What every report must say."""
        return NOTES[self.goal]

    def describe(self) -> dict[str, Any]:
        """What stands in front of the detector, as plain data."""
        return {
            "translator": dict(self.translator.settings),
            "goal": self.goal,
            "parameters": sum(p.numel() for p in self.translator.parameters()),
            "note": self.note,
        }

    def fresh(self, seed: int) -> Self:
        """Build both anew, with newly drawn weights; see `Detector.fresh`."""
        new = type(self)(self.detector.fresh(seed), self.translator.fresh(seed), self.goal)
        return new.to(self.device).train()

    def save_native(self, folder: Path, size: tuple[int, int] | None = None) -> None:
        """Write ``detector/`` as its library would, and the translator beside it.

        Args:
            folder: an existing folder.
            size: height and width for which the translator is also exported, see
                `export_translator`; None leaves that out.
        """
        folder = Path(folder)
        (folder / DETECTOR_FOLDER).mkdir(exist_ok=True)
        self.detector.save_native(folder / DETECTOR_FOLDER)
        write_weights(self.translator, folder / WEIGHTS_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.describe(), indent=2) + "\n")
        if size is not None:
            self.export_translator(folder / EXPORT_FILE, *size)

    def export_translator(self, path: Path, height: int, width: int) -> None:
        """Write the translator as a program that torch runs without mmforget.

        ``torch.export.load(path).module()(images)`` translates pictures (B, 3, height, width) in
        [0, 1] for any number B of them.

        Args:
            path: ends in ``.pt2``.
            height: of the pictures, in pixels.
            width: of the pictures, in pixels.
        """
        network = copy.deepcopy(self.translator).eval().cpu()
        example = torch.rand(2, 3, height, width)
        shapes = {"images": {0: torch.export.Dim("pictures")}}
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        torch.export.save(program, path)


def load_translated(folder: str | Path) -> TranslatedDetector:
    """Load what `TranslatedDetector.save_native` wrote, in evaluation mode.

    Raises:
        MissingFileError: a file is missing.
        WeightsError: the translator is damaged or does not fit; see also `load_detector`.
    """
    path = Path(folder).expanduser()
    about = path / SETTINGS_FILE
    if not about.is_file():
        raise MissingFileError(
            f"'{path}' has no {SETTINGS_FILE}; give a folder that holds a translated detector, or "
            "load the detector alone with `load_detector`"
        )
    try:
        described = json.loads(about.read_text())
        translator = Translator.seeded(0, **described["translator"])
        goal = described["goal"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"'{about}' is damaged ({error}); copy it again") from error
    put_weights(translator, read_weights(path / WEIGHTS_FILE), path / WEIGHTS_FILE)
    inner = path / DETECTOR_FOLDER
    stacked = (inner / SETTINGS_FILE).is_file()
    detector = load_translated(inner) if stacked else load_detector(inner)
    return TranslatedDetector(detector, translator, goal).eval()
