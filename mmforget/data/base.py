"""Labelled images with stable ids, and the data module that gives every sample its role."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mmforget.data.access import DataAccess
from mmforget.data.hashing import uniform
from mmforget.data.split import (
    STAGES,
    ForgetSplit,
    Labelled,
    Limits,
    Role,
    Stage,
    make_split,
    role_masks,
)
from mmforget.errors import AccessError, ConfigurationError, DataError, suggest
from mmforget.request import ForgetRequest
from mmforget.seeds import generator

View = Literal["full", "retain", "forget", "paired", "statistics", "decoupled"]

CACHE_LIMIT_BYTES = 2**30
"""Up to this size the decoded pixels of a data set stay in memory, above it they are read anew."""


class Positions(list[int]):
    """One batch as yielded by `GlobalBatchSampler`: positions, ``~p`` for a repeat of p as padding.

    Attributes:
        draw: (epoch, pass within the epoch), the key of random transforms. It travels with the
            batch because loader workers hold copies of the data set that know of no epoch.
    """

    draw: tuple[int, int] = (0, 0)


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Labelled images with stable ids, read lazily. Subclasses implement `read`.

    Pixels that have been read are kept, up to `CACHE_LIMIT_BYTES` for the whole source, and are
    shared by all subsets.

    Args:
        name: of the source and the stage, for messages and hashes.
        ids: (N,) int64, unique and stable.
        labels: (N,) int64 class indices, or None.
        class_names: names by class index; empty without labels.
        image_shape: (3, H, W) of every image.
        flippable: whether a mirrored image is still an example of its class.

    Raises:
        DataError: ids that are not unique, or labels out of range.
    """

    def __init__(
        self,
        name: str,
        ids: np.ndarray,
        labels: np.ndarray | None,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        flippable: bool = True,
    ) -> None:
        self.name = name
        self.ids = np.asarray(ids, dtype=np.int64)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self.flippable = flippable
        self.forget: np.ndarray | None = None
        self._augment_seed: int | None = None
        self._rows = np.arange(len(self.ids))
        if len(np.unique(self.ids)) != len(self.ids):
            raise DataError(f"data set '{name}' has sample ids that are not unique")
        if self.labels is not None:
            wrong = (self.labels < 0) | (self.labels >= len(self.class_names))
            if wrong.any():
                raise DataError(
                    f"data set '{name}' has label {self.labels[wrong][0]} at id "
                    f"{self.ids[wrong][0]}, but {len(self.class_names)} classes"
                )
        size = len(self.ids) * math.prod(image_shape)
        self._pixels: Tensor | None = None
        self._known: Tensor | None = None
        if size <= CACHE_LIMIT_BYTES:
            # Memory is taken only where pixels are written.
            self._pixels = torch.empty((len(self.ids), *image_shape), dtype=torch.uint8)
            self._known = torch.zeros(len(self.ids), dtype=torch.bool)

    @abstractmethod
    def read(self, rows: np.ndarray) -> Tensor:
        """Decode images of the source.

        Args:
            rows: (B,) row numbers of the source, not positions of a subset.

        Returns:
            (B, 3, H, W) uint8.
        """

    def pixels(self, positions: np.ndarray) -> Tensor:
        """Return images (B, 3, H, W) as uint8, without any transform."""
        rows = self._rows[np.asarray(positions, dtype=np.int64)]
        if self._pixels is None or self._known is None:
            return self.read(rows)
        index = torch.from_numpy(rows)
        new = np.unique(rows[~self._known[index].numpy()])
        if len(new):
            self._pixels[torch.from_numpy(new)] = self.read(new)
            self._known[torch.from_numpy(new)] = True
        return self._pixels[index]

    def images(self, positions: np.ndarray) -> Tensor:
        """Return images (B, 3, H, W), float32 in [0, 1], without any transform."""
        return self.pixels(positions).float() / 255

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ids)

    def __getitem__(self, positions: int | Sequence[int]) -> dict[str, Tensor]:
        """Return one sample for an integer, or a whole batch for a sequence.

        A negative position ``~p`` gives sample p as padding, with weight 0.
        """
        if isinstance(positions, int | np.integer):
            return {key: value[0] for key, value in self[[int(positions)]].items()}
        given = np.asarray(positions, dtype=np.int64)
        index = np.where(given < 0, ~given, given)
        images, ids = self.images(index), self.ids[index]
        if self._augment_seed is not None:
            draw = positions.draw if isinstance(positions, Positions) else (0, 0)
            images = augment(images, ids, self._augment_seed, draw, self.flippable)
        batch = {
            "image": images,
            "id": torch.from_numpy(ids),
            "weight": torch.from_numpy((given >= 0).astype(np.float32)),
        }
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[index])
        if self.forget is not None:
            batch["forget"] = torch.from_numpy(self.forget[index])
        return batch

    def subset(self, positions: np.ndarray) -> Self:
        """Return a view of some samples, in the given order; pixels are shared."""
        index = np.asarray(positions)
        view = copy.copy(self)
        view.ids = self.ids[index]
        view.labels = None if self.labels is None else self.labels[index]
        view.forget = None if self.forget is None else self.forget[index]
        view._rows = self._rows[index]
        return view

    @property
    def classes(self) -> np.ndarray | None:
        """What roles depend on: (N,) class indices, (N, C) bool of scenes, None without labels."""
        return self.labels

    def unlabelled(self) -> Self:
        """Return a view whose batches have no ``label``."""
        view = copy.copy(self)
        view.labels = None
        return view

    def augmented(self, seed: int) -> Self:
        """Return a view whose batches are randomly transformed, see `augment`."""
        view = copy.copy(self)
        view._augment_seed = seed
        return view

    def marked(self, forget: np.ndarray) -> Self:
        """Return a view whose batches carry ``forget`` (B,) bool."""
        view = copy.copy(self)
        view.forget = np.asarray(forget, dtype=bool)
        return view

    @property
    def hash(self) -> str:
        """SHA-256 over name, class names, ids and labels; pixels are not read for it."""
        digest = hashlib.sha256("\n".join((self.name, *self.class_names)).encode())
        digest.update(self.ids.astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def augment(
    images: Tensor, ids: np.ndarray, seed: int, draw: tuple[int, int], flip: bool
) -> Tensor:
    """Shift every image by up to an eighth of its side, and mirror half of them.

    The draws are keyed by sample, so they depend neither on the batch nor on the number of workers
    or processes. Library transforms draw from the global generator and cannot be keyed so.

    Args:
        images: (B, 3, H, W).
        ids: (B,) sample ids.
        seed: base seed.
        draw: (epoch, pass within the epoch).
        flip: whether to mirror.

    Returns:
        (B, 3, H, W); the border is filled by reflection.
    """
    height, width = images.shape[-2:]
    pad = max(1, height // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad), mode="reflect")

    def offsets(purpose: str) -> Tensor:
        return torch.from_numpy((uniform(ids, seed, purpose, *draw) * (2 * pad + 1)).astype(int))

    rows = offsets("crop-top")[:, None] + torch.arange(height)
    columns = offsets("crop-left")[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.from_numpy(uniform(ids, seed, "flip", *draw) < 0.5)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    sample = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


class GlobalBatchSampler(DistributedSampler[Any]):
    """Batches of positions that are the same for any number of processes.

    There is one permutation per (seed, purpose, epoch). Every global batch is padded with repeats,
    marked as ``~p``, to a multiple of the number of processes, and process r takes every
    world-size-th element from r on. A loader that is restarted within an epoch, because the other
    stream of a pair is longer, goes on with a new permutation.

    It is a `DistributedSampler` so that Lightning neither replaces nor wraps it. Use it with
    ``DataLoader(dataset, sampler=..., batch_size=None)``.

    Args:
        dataset: anything with a length.
        batch_size: of the global batch.
        shuffle: draw a permutation; else positions are in order.
        seed: base seed.
        purpose: what the permutation is for, so that two streams differ.
        epoch: the first epoch. Lightning creates the iterator of the first epoch after a resume
            before it calls `set_epoch`.
        rank, world: of this process; None asks `torch.distributed` when the iteration starts.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        purpose: str = "eval",
        epoch: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        self.batch_size = batch_size
        self.purpose = purpose
        self.epoch = epoch
        self._place = (rank, world)
        self._pass = 0

    def place(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        rank, world = self._place
        if rank is not None and world is not None:
            return rank, world
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch. Repeating the current one is harmless, Lightning does it."""
        if epoch != self.epoch:
            self.epoch, self._pass = epoch, 0

    def __len__(self) -> int:
        """Number of batches, the same for every process."""
        return math.ceil(len(self.dataset) / self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Positions]:  # type: ignore[override]
        """Yield the batches of one pass."""
        draw = (self.epoch, self._pass)
        self._pass += 1
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            order = torch.randperm(size, generator=generator(self.seed, self.purpose, *draw))
        else:
            order = torch.arange(size)
        rank, world = self.place()
        for start in range(0, size, self.batch_size):
            batch = order[start : start + self.batch_size]
            lacking = -len(batch) % world
            padding = ~batch.repeat(math.ceil(lacking / len(batch)))[:lacking]
            positions = Positions(torch.cat([batch, padding])[rank::world].tolist())
            positions.draw = draw
            yield positions


class ForgetDataModule(LightningDataModule):
    """A labelled data set in three stages, and the roles that its samples play in a request.

    Subclasses implement `build`. Nothing is read before it is needed.

    Args:
        batch_size: of the global batch, over all processes; in the view ``paired`` of each of the
            two streams.
        seed: base of all draws.
        num_workers: loader processes; 0 reads in the main process, which is best for small images,
            since they stay in its memory once they are decoded.
        view: what `train_dataloader` serves: ``full`` (all training data), ``retain``, ``forget``,
            ``paired`` (both at once, the shorter stream is cycled), ``statistics`` (forget and
            retain, each sample once, in id order) or, for questions about pictures, ``decoupled``
            (see `mmforget.data.questions`).
        shots: exactly this many training samples per class for forget and retain.
        missing_classes: retained classes without training samples.
        retain_fraction: share of the retain set, drawn uniformly, in (0, 1].
        augment: shift and, where sensible, mirror training images.

    Raises:
        DataError: a number out of range.
        ConfigurationError: an unknown view.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"`batch_size` is {batch_size}, it must be at least 1")
        if num_workers < 0:
            raise DataError(f"`num_workers` is {num_workers}, it must be 0 or more")
        if view not in get_args(View):
            raise ConfigurationError(f"`view` is '{view}', {suggest(view, get_args(View))}")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.view: View = view
        self.limits = Limits(shots, tuple(missing_classes), retain_fraction)
        self.augment = augment
        self.access: DataAccess | None = None
        self.split: ForgetSplit | None = None
        self._requests: tuple[ForgetRequest, ...] = ()
        self._stages: dict[Stage, ImageDataset] = {}

    @abstractmethod
    def build(self) -> dict[Stage, ImageDataset]:
        """Open the three stages; pixels may be left for later."""

    # ---- the data ---------------------------------------------------------------------------

    def dataset(self, stage: Stage) -> ImageDataset:
        """Return everything of a stage, for audits.

        Raises:
            AccessError: called by a method, which may read roles only.
        """
        if self.access is not None:
            raise AccessError(
                f"a forgetting method may not read the whole stage '{stage}'; "
                "use `subset` with the role 'forget' or 'retain'"
            )
        return self._stage(stage)

    def _stage(self, stage: Stage) -> ImageDataset:
        if not self._stages:
            self._stages.update(self.build())
        if stage not in self._stages:
            raise DataError(f"there is no stage '{stage}', {suggest(stage, STAGES)}")
        return self._stages[stage]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty for data without labels."""
        return self._stage("train").class_names

    @property
    def num_classes(self) -> int:
        """Number of classes, forgotten ones included: class ids are never renumbered."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of every image."""
        return self._stage("train").image_shape

    # ---- requests and roles -----------------------------------------------------------------

    def request(self, *requests: ForgetRequest) -> ForgetSplit:
        """Give every sample its role under the last request, and set `split`.

        Args:
            requests: in order; all but the last were forgotten before.

        Raises:
            RequestError, DataError: see `mmforget.data.split.make_split`.
        """
        self.split = make_split(
            {stage: self._labelled(stage) for stage in STAGES},
            self.class_names,
            requests,
            self.limits,
            self.seed,
        )
        self._requests = requests
        return self.split

    def subset(self, stage: Stage, role: Role, whole: bool = False) -> ImageDataset:
        """Return the samples of a stage that play a role.

        Args:
            stage: ``train``, ``val`` or ``test``.
            role: ``all``, ``forget``, ``retain`` (with missing classes in validation and test),
                ``previous`` (forgotten by earlier requests) or ``missing``.
            whole: ignore shots, retain fraction and missing classes.

        Raises:
            ConfigurationError: no request was made, or there is no such role.
            AccessError: a method reads what it has not declared.
        """
        if role not in get_args(Role):
            raise ConfigurationError(f"there is no role '{role}', {suggest(role, get_args(Role))}")
        self._check_access(stage, role, whole)
        data = self._stage(stage)
        if role == "all":
            return data
        if self.split is None:
            raise ConfigurationError(
                f"role '{role}' needs a request; call `datamodule.request(...)` first"
            )
        if whole:
            split, last = self.split, self._requests[-1]
            earlier = [sample for request in self._requests[:-1] for sample in request.samples]
            chosen = role_masks(
                self._labelled(stage),
                split.forget_classes,
                last.samples,
                split.previous_classes,
                earlier,
                split.missing_classes,
            )[role]
        else:
            chosen = np.isin(data.ids, np.asarray(self.split.ids[f"{stage}/{role}"], np.int64))
        data = data.subset(np.flatnonzero(chosen))
        return data if self._labels_allowed(role) else data.unlabelled()

    def _labels_allowed(self, role: Role) -> bool:
        if self.access is None:
            return True
        return self.access.forget_labels if role == "forget" else self.access.retain_labels

    def _check_access(self, stage: Stage, role: Role, whole: bool) -> None:
        access = self.access
        if access is None:
            return
        if stage == "test":
            raise AccessError(
                f"a forgetting method may not read test data (role '{role}'); "
                "use 'train', or 'val' to tune"
            )
        if role in ("all", "previous", "missing"):
            raise AccessError(
                f"a forgetting method may not read the role '{role}'; use 'forget' or 'retain'"
            )
        if role == "forget" and not access.forget_inputs:
            raise AccessError(
                "the method reads the forget set, but declares `forget_inputs=False`; "
                "declare it in `access`"
            )
        if role == "retain" and access.retain == "none":
            raise AccessError(
                "the method reads the retain set, but declares `retain='none'`; "
                "declare it in `access`"
            )
        if role == "retain" and whole and access.retain != "full":
            raise AccessError(
                "the method reads the whole retain set, but declares "
                f"`retain='{access.retain}'`; declare 'full' in `access`"
            )

    def restricted(self, access: DataAccess) -> Self:
        """Return a shallow copy for a running method, which may read what `access` declares."""
        view = copy.copy(self)
        view.access = access
        return view

    def unlimited(self) -> Self:
        """Return a shallow copy without shots, missing classes and retain fraction.

        The retrained reference learns from all retained data, however little the method is given.
        """
        view = copy.copy(self)
        view.limits = Limits()
        if view._requests:
            view.request(*view._requests)
        return view

    # ---- loaders ----------------------------------------------------------------------------

    def loader(
        self,
        dataset: ImageDataset,
        batch_size: int | None = None,
        shuffle: bool = False,
        purpose: str = "eval",
    ) -> DataLoader[dict[str, Tensor]]:
        """Make a loader of whole batches whose global order does not depend on the processes.

        Args:
            dataset: what to load.
            batch_size: of the global batch; by default that of the data module.
            shuffle: draw a new permutation in every epoch.
            purpose: key of the permutations.
        """
        sampler = GlobalBatchSampler(
            dataset,
            batch_size or self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            purpose=purpose,
            epoch=self._epoch(),
        )
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _epoch(self) -> int:
        """The epoch at which training goes on after a resume."""
        if self.trainer is None:
            return 0
        return int(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    def _train_loader(self, role: Role) -> DataLoader[dict[str, Tensor]]:
        return self._stream(self.subset("train", role), role)

    def _stream(self, data: ImageDataset, name: str) -> DataLoader[dict[str, Tensor]]:
        if self.augment:
            data = data.augmented(self.seed)
        return self.loader(data, shuffle=True, purpose=f"train-{name}")

    def train_dataloader(self) -> Any:
        """Return the loader of the current `view`."""
        if self.view == "full":
            return self._train_loader("all")
        if self.view == "statistics":
            return self.loader(self._statistics())
        if self.view == "paired" or self.view == "decoupled":
            streams = {
                "forget": self._train_loader("forget"),
                "retain": self._train_loader("retain"),
            }
            if self.view == "decoupled":
                streams["decouple"] = self._stream(self._decoupled(), "decouple")
            return CombinedLoader(streams, mode="max_size_cycle")
        return self._train_loader(self.view)

    def _decoupled(self) -> ImageDataset:
        """What the view ``decoupled`` serves besides forget and retain."""
        raise ConfigurationError(
            f"`view` is 'decoupled', which needs questions about pictures, but "
            f"{type(self).__name__} has none; use 'paired'"
        )

    def _statistics(self) -> ImageDataset:
        """Forget and retain data in id order; unlabelled unless both labels were declared."""
        forget = self.subset("train", "forget")
        retain = self.subset("train", "retain")
        data = self._stage("train")
        positions = np.flatnonzero(np.isin(data.ids, np.concatenate([forget.ids, retain.ids])))
        positions = positions[np.argsort(data.ids[positions])]
        data = data.subset(positions)
        data = data.marked(np.isin(data.ids, forget.ids))
        labelled = self._labels_allowed("forget") and self._labels_allowed("retain")
        return data if labelled else data.unlabelled()

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """One loader per role of `eval_names`."""
        return [self.loader(self.subset("val", role)) for role in self.eval_names("val")]

    def test_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """One loader per role of `eval_names`."""
        return [self.loader(self.subset("test", role)) for role in self.eval_names("test")]

    def eval_names(self, stage: Stage) -> tuple[Role, ...]:
        """Roles of the loaders of a stage, in order: those that have samples and may be read."""
        if self.split is None:
            return ("all",)
        roles: list[Role] = ["forget", "retain"]
        if self.access is None:
            roles.append("previous")
        else:
            if not self.access.forget_inputs:
                roles.remove("forget")
            if self.access.retain == "none":
                roles.remove("retain")
        return tuple(role for role in roles if self.split.ids[f"{stage}/{role}"])

    def _labelled(self, stage: Stage) -> Labelled:
        """What the roles of a stage depend on."""
        data = self._stage(stage)
        return Labelled(data.ids, data.classes, data.hash)
