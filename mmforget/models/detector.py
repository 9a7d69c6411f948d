"""Object detectors of transformers and torchvision, as one Lightning module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmforget.errors import AccessError, MissingFileError, ModelError
from mmforget.models import detector_files, native
from mmforget.models.base import Batch, Instances, LossParts, Site, SiteKind
from mmforget.models.classifier import HUB_ID
from mmforget.models.detector_files import DetectorLibrary
from mmforget.models.detectors.base import Detections, Objects
from mmforget.models.ffn_sites import find_sites
from mmforget.models.native import Architecture
from mmforget.models.recipe import TrainedModel, check_recipe


class Detector(TrainedModel):
    """A detection network with its normalisation, its training recipe and its parts by name.

    DETR, Conditional DETR, Deformable DETR and RT-DETR of transformers; Faster R-CNN, RetinaNet and
    FCOS of torchvision. Offers `HasLoss`, `HasLogits` (the highest score of each class anywhere in
    the picture), `HasHead` and `Sites`; `instances` gives the matched objects. Batches are those of
    `mmforget.data.detection.DetectionDataset`: boxes in pixels, classes from 0 without background.

    ::

        model = Detector("rt_detr", num_classes=10, network_args={...})
        Trainer(max_epochs=20, gradient_clip_val=0.5).fit(model, datamodule)
        model.save_native(folder)   # AutoModelForObjectDetection.from_pretrained(folder) loads it

    Args:
        network: model type, hub id or folder (transformers), name of a builder (torchvision), or a
            network itself; `fresh` works for the latter only if it is transformers'.
        num_classes: number of classes without background; None takes what the network has.
        library: who knows `network`; ignored if that is a network.
        pretrained: start from the library's weights (a download).
        weights: file of native weights, safetensors or a plain state dict.
        network_args: fields of the configuration (transformers) or arguments of the builder
            (torchvision: ``min_size``, ``max_size``, ``trainable_backbone_layers``).
        mean: mean of each channel, in [0, 1], for transformers; None takes that of its image
            processor. Networks of torchvision normalise by themselves.
        std: standard deviation of each channel, positive; as `mean`.
        class_names: names of the classes.
        most: detections per image.
        lr: highest learning rate of AdamW.
        weight_decay: decoupled, for weights of at least two dimensions.
        warmup: share of the steps in [0, 1) over which the rate rises from 0 to `lr`; it then
            follows a cosine down to 0.
        allow_pickle: execute the code in a pickle named by `weights`.

    Raises:
        ModelError: the network cannot be built, or is none that mmforget knows.
        MissingFileError: there is no file `weights`.
        WeightsError: `weights` do not fit, are damaged, or would execute code.
        ConfigurationError: a number of the recipe is out of range.
    """

    find_unused_parameters: ClassVar[bool] = True  # heads of earlier layers, denoised objects

    def __init__(
        self,
        network: str | nn.Module = "rt_detr",
        num_classes: int | None = None,
        library: DetectorLibrary = "transformers",
        pretrained: bool = False,
        weights: str | Path | None = None,
        network_args: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] = (),
        most: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.05,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        check_recipe(lr, weight_decay, warmup)
        if num_classes is not None and num_classes < 1:
            raise ModelError(f"`num_classes` is {num_classes}; it must be at least 1")
        if most < 1:
            raise ModelError(f"`most` is {most}; it must be at least 1")
        self.architecture: Architecture | None = None
        if isinstance(network, str):
            self.architecture = Architecture(library, network, num_classes, network_args or {})
            self.network = detector_files.build(self.architecture, pretrained and weights is None)
        elif network_args or pretrained:
            raise ModelError(
                "`network_args` and `pretrained` go with a network given by its name; leave them "
                "out or give the name"
            )
        else:
            self.network = network
        source = network if isinstance(network, str) else ""
        usual_mean, usual_std = detector_files.default_statistics(self.network, source)
        mean, std = mean or usual_mean, std or usual_std
        if not all(value > 0 for value in std):
            raise ModelError(f"`std` is {tuple(std)}; every value must be positive")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(tuple(mean)))
        self.register_buffer("std", torch.tensor(tuple(std)))
        if weights is not None:
            detector_files.load(self.network, weights, allow_pickle)
        self._wrap()
        if num_classes is not None and num_classes != self.num_classes:
            raise ModelError(
                f"{type(self.network).__name__} has {self.num_classes} classes, but `num_classes` "
                f"is {num_classes}; correct it"
            )
        if class_names and len(class_names) != self.num_classes:
            raise ModelError(
                f"`class_names` has {len(class_names)} names for {self.num_classes} classes; "
                "give one per class"
            )
        self.class_names = tuple(class_names)
        self.most = most
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self._precision: dict[str, Any] = {}
        ignored = ["pretrained", "weights", "allow_pickle"]
        self.save_hyperparameters(
            ignore=ignored if isinstance(network, str) else [*ignored, "network"]
        )

    def _wrap(self) -> None:
        self._wrapped = (detector_files.wrapped(self.network, self.mean, self.std),)
        self.num_classes = self.kind.num_classes
        self.num_features = self.kind.num_features

    @property
    def kind(self) -> Any:
        """The network behind the common contract; always around the weights of this model."""
        kind: Any = self._wrapped[0]
        kind.network = self.network
        kind.mean, kind.std = self.mean, self.std
        return kind

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy; the wrapper around the network is made anew for the copied one."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo.setdefault(id(self._wrapped), ())
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        new._wrap()
        return new

    # ---- capabilities -------------------------------------------------------------------------

    def objects(self, batch: Batch) -> list[Objects]:
        """The labelled objects per image; crowds are left out.

        Raises:
            AccessError: the batch has no labels.
        """
        if "label" not in batch:
            raise AccessError(
                "a detector's loss needs boxes and labels, which this batch does not carry; "
                "declare labels in the method's `access`"
            )
        real = (batch["label"] >= 0) & ~batch["crowd"]
        return [
            Objects(boxes[chosen], label[chosen])
            for boxes, label, chosen in zip(batch["boxes"], batch["label"], real, strict=True)
        ]

    def forward(self, images: Tensor, extent: Tensor | None = None) -> list[Detections]:
        """Detections of (B, 3, H, W) images in [0, 1]; `extent` (B, 2) is their true size."""
        if extent is None:
            extent = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
        return self.kind.detect(images, extent, self.most)  # type: ignore[no-any-return]

    def detect(self, batch: Batch) -> list[Detections]:
        """Detections in every image of a batch, best first, boxes in pixels."""
        return self(batch["image"], batch["extent"])  # type: ignore[no-any-return]

    def loss_parts(self, batch: Batch) -> LossParts:
        """(B,) classification, which forgetting reverses, and boxes, which it keeps."""
        found: LossParts = self.kind.losses(batch["image"], batch["extent"], self.objects(batch))
        return found

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B,) losses of the last layer, each of one image alone."""
        return self.loss_parts(batch).total

    def training_loss(self, batch: Batch) -> Tensor:
        """Return (B,) losses with those of earlier decoder layers and of denoised objects."""
        found: Tensor = self.kind.training_loss(
            batch["image"], batch["extent"], self.objects(batch)
        )
        return found

    def instances(self, batch: Batch) -> Instances:
        """The objects of a batch with the features and scores that are matched to them."""
        found: Instances = self.kind.instances(batch["image"], batch["extent"], self.objects(batch))
        return found

    def logits(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B, C): the highest score of each class anywhere in the picture, as a logit."""
        found: Tensor = self.kind.logits(batch["image"], batch["extent"])
        return found

    @property
    def forget_bound(self) -> float:
        """15, as published for the weighted classification loss of Deformable DETR."""
        return 15.0

    @property
    def head(self) -> nn.Module:
        """The layer that gives the final class scores."""
        layer: nn.Module = self.kind.head
        return layer

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """The layers of the final scores, with the rows of these classes."""
        found: list[tuple[nn.Module, list[int]]] = self.kind.class_rows(classes)
        return found

    def sites(self, kind: SiteKind) -> list[Site]:
        """Return the layers of one kind; see `mmforget.models.ffn_sites.find_sites`.

        In Faster R-CNN the two layers of the box head are its feed-forward layers; RetinaNet and
        FCOS have none.
        """
        return find_sites(self.network, kind, (*self.kind.head_names, *self.kind.hidden_names))

    # ---- saving and rebuilding ----------------------------------------------------------------

    def save_native(self, folder: Path) -> None:
        """Write the weights as the network's library would; `mmforget.models.base.Model`."""
        detector_files.save(
            self.network,
            Path(folder),
            self.architecture,
            native.plain(self.mean.tolist()),
            native.plain(self.std.tolist()),
            self.class_names,
        )

    def fresh(self, seed: int) -> Self:
        """Build the same model with newly drawn weights, in training mode.

        Args:
            seed: decides the weights; the global random generator is left as it is.

        Raises:
            ModelError: the network was given as an object of torchvision.
        """
        return self.with_network(
            seed, lambda: detector_files.redrawn(self.architecture, self.network)
        )

    # ---- training -------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        self._precision = {}

    def on_test_epoch_start(self) -> None:
        """Start collecting."""
        self._precision = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect detections."""
        self._collect("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect detections."""
        self._collect("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/ap`` and ``val/ap50``, or ``val/ap/<name>`` per loader."""
        self._log_precision()

    def on_test_epoch_end(self) -> None:
        """Log ``test/ap`` and ``test/ap50``, or ``test/ap/<name>`` per loader."""
        self._log_precision()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return ids (B,) and per image boxes (D, 4), scores (D,) and labels (D,)."""
        real = batch["weight"] > 0
        found = [one for one, kept in zip(self.detect(batch), real, strict=True) if kept]
        return {
            "id": batch["id"][real],
            "boxes": [one.boxes for one in found],
            "scores": [one.scores for one in found],
            "labels": [one.labels for one in found],
        }

    def _collect(self, stage: str, batch: Batch, loader: int) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        key = f"{stage}/{{}}{self.role_of(stage, loader)}"
        if key not in self._precision:
            self._precision[key] = MeanAveragePrecision().to(self.device)
        self._precision[key].update(*compared(self.detect(batch), batch))

    def _log_precision(self) -> None:
        for key, metric in self._precision.items():
            values = metric.compute()  # adds up all processes
            self.log(key.format("ap"), values["map"], prog_bar=True)
            self.log(key.format("ap50"), values["map_50"])
        self._precision = {}


def compared(
    found: Sequence[Detections], batch: Batch
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Detections and labelled boxes of a batch as torchmetrics wants them, padding left out."""
    predictions, targets = [], []
    for row, one in enumerate(found):
        if not batch["weight"][row] > 0:
            continue
        real = batch["label"][row] >= 0
        predictions.append({"boxes": one.boxes, "scores": one.scores, "labels": one.labels})
        targets.append(
            {
                "boxes": batch["boxes"][row][real],
                "labels": batch["label"][row][real],
                "iscrowd": batch["crowd"][row][real].long(),
            }
        )
    return predictions, targets


def load_detector(
    source: str | Path,
    network: str | nn.Module | None = None,
    num_classes: int | None = None,
    library: DetectorLibrary = "transformers",
    network_args: dict[str, Any] | None = None,
    allow_pickle: bool = False,
) -> Detector:
    """Load a trained detector, in evaluation mode.

    Args:
        source: a folder saved by transformers or mmforget (a native folder or an artifact), a hub
            id ``owner/name``, or a file of weights for `network`.
        network: what the weights belong to; needed for a file, and for the folder of a torchvision
            network that was given as an object.
        num_classes: number of classes of `network`.
        library: who knows `network`.
        network_args: further arguments of its builder.
        allow_pickle: execute the code in a pickle. Only for files from a source you trust.

    Raises:
        MissingFileError: there is no such file, folder or hub id.
        WeightsError: the weights are damaged, do not fit, or would execute code.
        ModelError: the network cannot be built.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and network is not None):
        if network is None:
            raise ModelError(
                f"'{path}' holds weights only; say by `network` (and `num_classes`, "
                "`network_args`) what they belong to, or give a folder with its config.json"
            )
        return Detector(
            network,
            num_classes,
            library,
            weights=path if path.is_file() else native.weights_file(path),
            network_args=network_args,
            allow_pickle=allow_pickle,
        ).eval()
    if not path.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise MissingFileError(
                f"there is no '{source}'; give a file, a folder, or a hub id of the form "
                "'owner/name'"
            )
        path = native.hub_folder(str(source))
    architecture, names = detector_files.read(path)
    built = detector_files.read_network(path, architecture)
    mean, std = detector_files.default_statistics(built, str(path))
    model = Detector(built, mean=mean, std=std, class_names=names).eval()
    model.architecture = None if architecture.library == "transformers" else architecture
    return model
