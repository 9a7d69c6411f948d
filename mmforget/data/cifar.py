"""CIFAR-10 and CIFAR-100, from whichever files there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mmforget.data.base import ForgetDataModule, ImageDataset, View
from mmforget.data.huggingface import HuggingFaceData
from mmforget.data.pictures import check_fractions
from mmforget.data.split import Stage
from mmforget.data.torchvision_data import TorchvisionData
from mmforget.errors import MissingFileError


class CIFAR10(ForgetDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes.

    Args:
        folder: holds ``train.parquet`` and ``test.parquet``, or the files that torchvision reads.
        val_fraction: expected share of the training data that is held out for validation.
        download: fetch torchvision's files if they are missing. Do this once in a single process.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment: see
            `ForgetDataModule`.

    Raises:
        MissingFileError: the files are not there.

    Reference: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    dataset_name: ClassVar[str] = "CIFAR10"
    label_column: ClassVar[str] = "label"

    def __init__(
        self,
        folder: str,
        val_fraction: float = 0.1,
        download: bool = False,
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
        check_fractions(val_fraction)
        if not download and not Path(folder).is_dir():
            raise MissingFileError(
                f"`folder` is '{folder}', which does not exist; check the path, "
                "or set `download: true` once"
            )
        self.folder = Path(folder)
        self.val_fraction = val_fraction
        self.download = download

    def build(self) -> dict[Stage, ImageDataset]:
        """Open the parquet files if there are any, else torchvision's."""
        files = {stage: str(self.folder / f"{stage}.parquet") for stage in ("train", "test")}
        if Path(files["train"]).is_file():
            return HuggingFaceData(
                data_files=files,
                label_column=self.label_column,
                val_fraction=self.val_fraction,
            ).build()
        return TorchvisionData(
            self.dataset_name,
            str(self.folder),
            download=self.download,
            val_fraction=self.val_fraction,
        ).build()


class CIFAR100(CIFAR10):
    """CIFAR-100: as `CIFAR10`, with 100 fine classes.

    Args: see `CIFAR10`.
    """

    dataset_name: ClassVar[str] = "CIFAR100"
    label_column: ClassVar[str] = "fine_label"
