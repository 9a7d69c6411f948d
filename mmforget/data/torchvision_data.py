"""Classification data sets of torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmforget.data.base import ForgetDataModule, ImageDataset, View
from mmforget.data.pictures import STAGE_IDS, PictureDataset, check_fractions, complete
from mmforget.data.split import Stage
from mmforget.errors import ConfigurationError, DataError, MissingFileError, suggest

if TYPE_CHECKING:
    from PIL.Image import Image


class TorchvisionData(ForgetDataModule):
    """Any classification data set of `torchvision.datasets`, by the name of its class.

    Args:
        dataset: for example ``CIFAR10``, ``SVHN``, ``Flowers102``.
        root: folder of its files; None for data sets without files.
        dataset_args: further arguments of its constructor.
        download: fetch the files if they are missing. Do this once in a single process.
        train_split: split to train on, for data sets with an argument ``split``.
        val_split: split to validate on, likewise; None holds one out of the training data.
        test_split: split to test on, likewise; None holds one out of the training data.
        val_fraction: expected share of the training data that is held out for validation.
        test_fraction: the same for data sets without a test split.
        image_size: side of the square to which images are cropped and resized; None if all have
            the same size.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment: see
            `ForgetDataModule`.

    Raises:
        ConfigurationError: an unknown data set or argument.
        MissingFileError: its files are not there.
        DataError: it is not for classification.
    """

    def __init__(
        self,
        dataset: str,
        root: str | None = None,
        dataset_args: Mapping[str, Any] | None = None,
        download: bool = False,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        image_size: int | None = None,
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
        check_fractions(val_fraction, test_fraction)
        self.dataset_name = dataset
        self.root = root
        self.dataset_args = dict(dataset_args or {})
        self.download = download
        self.splits: dict[Stage, str | None] = {
            "train": train_split,
            "val": val_split,
            "test": test_split,
        }
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.image_size = image_size

    def build(self) -> dict[Stage, ImageDataset]:
        """Open the splits; images are decoded when they are first asked for."""
        import torchvision

        known = torchvision.datasets.__all__
        if self.dataset_name not in known:
            raise ConfigurationError(
                f"`dataset` is '{self.dataset_name}', {suggest(self.dataset_name, known)}"
            )
        kind = getattr(torchvision.datasets, self.dataset_name)
        accepted = inspect.signature(kind).parameters
        for name in self.dataset_args:
            if name not in accepted:
                raise ConfigurationError(
                    f"`dataset_args` of {self.dataset_name} has no '{name}', "
                    f"{suggest(name, accepted)}"
                )
        sources = {
            stage: self._open(kind, accepted, choice)
            for stage, choice in self._choices(accepted).items()
        }
        labels = {stage: _labels(self.dataset_name, source) for stage, source in sources.items()}
        names = _class_names(sources["train"])
        if names is None:
            names = tuple(str(n) for n in range(1 + max(int(v.max()) for v in labels.values())))
        stages: dict[Stage, ImageDataset] = {
            stage: PictureDataset(
                f"torchvision.{self.dataset_name}/{stage}",
                STAGE_IDS[stage] + np.arange(len(source)),
                labels[stage],
                names,
                _Opener(source),
                self.image_size,
            )
            for stage, source in sources.items()
        }
        return complete(stages, self.val_fraction, self.test_fraction)

    def _choices(self, accepted: Mapping[str, Any]) -> dict[Stage, dict[str, Any]]:
        """Constructor arguments that select the splits which the data set has."""
        if "split" in accepted:
            return {stage: {"split": name} for stage, name in self.splits.items() if name}
        if self.splits["val"] is not None:
            raise ConfigurationError(
                f"`val_split` is '{self.splits['val']}', but {self.dataset_name} has no named "
                "splits; leave it out to hold one out of the training data"
            )
        if "train" in accepted:
            return {"train": {"train": True}, "test": {"train": False}}
        return {"train": {}}

    def _open(self, kind: type, accepted: Mapping[str, Any], choice: dict[str, Any]) -> Any:
        arguments = {**self.dataset_args, **choice}
        if "root" in accepted:
            if self.root is None:
                raise ConfigurationError(f"`root` is missing; {self.dataset_name} reads files")
            arguments["root"] = self.root
        if "download" in accepted:
            arguments["download"] = self.download
        try:
            return kind(**arguments)
        except (RuntimeError, FileNotFoundError) as error:
            # torchvision reports missing files as either, and damaged ones as RuntimeError
            raise MissingFileError(
                f"{self.dataset_name} cannot be read from '{self.root}' ({error}); check `root`, "
                "or set `download: true` once"
            ) from error
        except ValueError as error:
            raise ConfigurationError(
                f"{self.dataset_name} refuses its arguments: {error}"
            ) from error


class _Opener:
    """Opens the pictures of rows; a class, so that loader workers can be sent it."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __call__(self, rows: Sequence[int]) -> Iterator[Image]:
        for row in rows:
            yield self._source[row][0]


def _labels(name: str, source: Any) -> np.ndarray:
    """Labels from the usual attributes, which spares decoding; else by reading every sample."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(source, attribute, None)
        if values is not None:
            break
    else:
        values = [source[row][1] for row in range(len(source))]
    try:
        labels = np.asarray(values)
    except ValueError:  # lists of unequal lengths: boxes, captions
        labels = np.empty(0)
    if labels.shape != (len(source),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"torchvision's {name} does not have one class index per image; "
            "choose a classification data set"
        )
    return labels.astype(np.int64)


def _class_names(source: Any) -> tuple[str, ...] | None:
    """Names by class index, if the data set has them; of synonyms the first is the name."""
    names = getattr(source, "classes", None) or getattr(source, "categories", None)
    if names is None:
        return None
    return tuple(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)
