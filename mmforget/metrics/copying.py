"""Is a generated picture a copy of a training picture: similarities, thresholds, replication rate.

What counts as a copy depends on how alike is measured, so that every similarity states its
`protocol`, which belongs to each number that comes out of it.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mmforget.data.memorized import MemorizedSet
from mmforget.errors import (
    ConfigurationError,
    DataError,
    MissingFileError,
    ModelError,
    WeightsError,
    suggest,
)
from mmforget.models.base import state_hash
from mmforget.models.weights import put_weights, read_weights

MARGIN = 1.05
"""By how much a copy must be more like the training picture than any unrelated picture is."""

SIMILARITIES = ("ncc", "l2")
"""Those without weights; any other name is the path of an SSCD file."""

SSCDPreset = Literal["nemo2024", "wen2024"]

_CONSTANT = 1e-6
"""Standard deviation below which a picture in [0, 1] counts as constant: far below one 8-bit level,
and above what rounding leaves of a constant in single precision."""


@runtime_checkable
class CopySimilarity(Protocol):
    """How alike two pictures are; higher is more alike, and 1 is the same picture.

    Attributes:
        name: such as ``ncc``.
        threshold: from which on a picture counts as a copy, if nothing is known of the data.
    """

    name: str
    threshold: float

    def __call__(
        self, generated: Tensor, references: Tensor, regions: Tensor | None = None
    ) -> Tensor:
        """Compare row by row.

        Args:
            generated: (B, 3, H, W) float in [0, 1].
            references: (B, 3, H, W) float in [0, 1].
            regions: (B, H, W) bool, the part of every reference that counts; None takes all of it.

        Returns:
            (B,) float32 on the CPU.
        """
        ...

    def matrix(
        self, generated: Tensor, references: Tensor, regions: Tensor | None = None
    ) -> Tensor:
        """Compare each with each.

        Args:
            generated: (A, 3, H, W) float in [0, 1].
            references: (B, 3, H, W) float in [0, 1].
            regions: (B, H, W) bool, the part of every reference that counts; None takes all of it.

        Returns:
            (A, B) float32 on the CPU.
        """
        ...

    def protocol(self) -> dict[str, Any]:
        """Everything that defines the number, as plain data."""
        ...


class _PixelSimilarity(ABC):
    """What the similarities of pixels share."""

    def __call__(
        self, generated: Tensor, references: Tensor, regions: Tensor | None = None
    ) -> Tensor:
        """See `CopySimilarity`.

        Raises:
            DataError: pictures or regions of a wrong kind, size or number.
        """
        _check_same_size(generated, references, regions)
        if len(generated) != len(references):
            raise DataError(
                f"there are {len(generated)} generated pictures and {len(references)} references; "
                "give one reference for each, or use `matrix`"
            )
        return self._rows(generated, references, regions).float().cpu()

    def matrix(
        self, generated: Tensor, references: Tensor, regions: Tensor | None = None
    ) -> Tensor:
        """See `CopySimilarity`.

        Raises:
            DataError: pictures or regions of a wrong kind, size or number.
        """
        _check_same_size(generated, references, regions)
        if not len(references):
            return torch.zeros(len(generated), 0)
        return self._matrix(generated, references, regions).float().cpu()

    @abstractmethod
    def _rows(self, generated: Tensor, references: Tensor, regions: Tensor | None) -> Tensor:
        """(B,) values; one reference with its region may serve for all rows."""

    def _matrix(self, generated: Tensor, references: Tensor, regions: Tensor | None) -> Tensor:
        columns = [
            self._rows(generated, one[None], None if regions is None else regions[row, None])
            for row, one in enumerate(references)
        ]
        return torch.stack(columns, 1)


class NormalisedCorrelation(_PixelSimilarity):
    r"""Correlation of the pixels of two pictures, in [-1, 1]; for small pictures that are aligned.

    :math:`\langle g - \bar g, r - \bar r\rangle / (\|g - \bar g\|\,\|r - \bar r\|)` over all
    channels and pixels of the region, so that brightness and contrast do not count. A constant
    picture is like nothing: 0.

    Args:
        threshold: above what unrelated pictures of the same kind usually reach; better calibrated
            by `copy_thresholds`.

    Raises:
        ConfigurationError: a threshold outside (0, 1].
    """

    name = "ncc"

    def __init__(self, threshold: float = 0.75) -> None:
        self.threshold = _checked_threshold(threshold)

    def _rows(self, generated: Tensor, references: Tensor, regions: Tensor | None) -> Tensor:
        one, one_size = _centred(generated, regions)
        other, other_size = _centred(references, regions)
        return (one * other).sum(1) / (one_size * other_size)

    def _matrix(self, generated: Tensor, references: Tensor, regions: Tensor | None) -> Tensor:
        if regions is not None:
            return super()._matrix(generated, references, regions)
        (one, one_size), (other, other_size) = _centred(generated, None), _centred(references, None)
        return (one / one_size[:, None]) @ (other / other_size[:, None]).T

    def protocol(self) -> dict[str, Any]:
        """See `CopySimilarity`."""
        return {
            "name": self.name,
            "threshold": self.threshold,
            "centred": "over channels and pixels",
            "regions": "pixels outside are left out",
        }


class PixelDistance(_PixelSimilarity):
    """1 minus the largest root mean squared difference of corresponding patches, in [0, 1].

    The largest, not the mean, since pictures with the same plain background are near each other
    everywhere but in the one patch that matters.

    Args:
        patches: per side; 1 compares pictures as wholes.
        threshold: the paper's distance of 0.15, taken from 1.

    Raises:
        ConfigurationError: `patches` below 1, or a threshold outside (0, 1].

    Reference:
        Carlini et al., Extracting training data from diffusion models, 2023, arXiv 2301.13188.
    """

    name = "l2"

    def __init__(self, patches: int = 4, threshold: float = 0.85) -> None:
        if patches < 1:
            raise ConfigurationError(f"`patches` is {patches}, it must be at least 1")
        self.patches, self.threshold = patches, _checked_threshold(threshold)

    def _rows(self, generated: Tensor, references: Tensor, regions: Tensor | None) -> Tensor:
        height, width = references.shape[-2:]
        if min(height, width) < self.patches:
            raise DataError(
                f"the pictures have {height}x{width} pixels, which cannot be cut into "
                f"{self.patches}x{self.patches} patches; choose fewer `patches`"
            )
        squares = (generated.double() - references.to(generated.device).double()).square().mean(1)
        inside = torch.ones_like(squares[:1])
        if regions is not None:
            inside = regions.to(squares)
        rows = torch.arange(height, device=squares.device) * self.patches // height
        columns = torch.arange(width, device=squares.device) * self.patches // width
        place = (rows[:, None] * self.patches + columns).flatten()
        total = squares.new_zeros(len(squares), self.patches**2)
        count = inside.new_zeros(len(inside), self.patches**2)
        total.index_add_(1, place, (squares * inside).flatten(1))
        count.index_add_(1, place, inside.flatten(1))
        # A patch without pixels of the region has the distance 0, which is never the largest.
        return 1 - (total / count.clamp(min=1)).sqrt().amax(1)

    def protocol(self) -> dict[str, Any]:
        """See `CopySimilarity`."""
        return {
            "name": self.name,
            "threshold": self.threshold,
            "patches": self.patches,
            "value": "1 - largest root mean squared difference of a patch",
            "regions": "pixels outside are left out",
        }


class DescriptorSimilarity:
    """Cosine of the descriptors of a copy detection network, in [-1, 1].

    Regions are not used: a descriptor stands for a picture as a whole, and these networks are known
    to miss template copies. Reports must say so.

    Args:
        network: from normalised images (B, 3, h, w) to descriptors (B, d).
        size: pixels to which pictures are resized: (height, width), or the shorter side.
        mean: per channel, subtracted.
        std: per channel, divided by.
        name: for reports.
        crop: side of the central square that is cut out after resizing; None keeps everything.
        threshold: 0.7 is usual for SSCD.
        batch_size: pictures at a time.

    Attributes:
        hash: SHA-256 of the network's weights.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Pizzi, Roy, Ravindra, Goyal, Douze, A self-supervised descriptor for image copy detection,
        2022, arXiv 2202.10261.
    """

    def __init__(
        self,
        network: nn.Module,
        size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "sscd",
        crop: int | None = None,
        threshold: float = 0.7,
        batch_size: int = 64,
    ) -> None:
        sides = [size] if isinstance(size, int) else list(size)
        for key, value in (("size", min(sides)), ("crop", crop or 1), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(f"`{key}` is {value}, it must be at least 1")
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise ConfigurationError(
                f"`mean` is {tuple(mean)} and `std` is {tuple(std)}; give three numbers each, "
                "those of `std` above 0"
            )
        self.network, self.size, self.crop, self.name = network.eval(), size, crop, name
        self.mean, self.std = tuple(mean), tuple(std)
        self.threshold, self.batch_size = _checked_threshold(threshold), batch_size
        self.hash = state_hash(network)

    @torch.no_grad()
    def descriptors(self, images: Tensor) -> Tensor:
        """Return (B, d) float32 descriptors of length 1 of images (B, 3, H, W), on the CPU.

        Raises:
            DataError: no pictures of that kind.
            ModelError: the network gives something else, or values that are not finite.
        """
        _check_pictures("pictures", images)
        parts = [self._described(part) for part in images.split(self.batch_size) if len(part)]
        return torch.cat(parts) if parts else torch.zeros(0, 1)

    def _described(self, images: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as T

        device = next((p.device for p in self.network.parameters()), images.device)
        size = [self.size] if isinstance(self.size, int) else list(self.size)
        # Smoothed as Pillow does, with which the published numbers were made.
        resized = T.resize(images.to(device).float(), size, antialias=True)
        if self.crop is not None:
            resized = T.center_crop(resized, [self.crop, self.crop])
        found = self.network.eval()(T.normalize(resized, list(self.mean), list(self.std)))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ModelError(
                f"the network of '{self.name}' gives {shape} for {len(images)} pictures; it must "
                "give one vector per picture"
            )
        if not bool(found.isfinite().all()):
            raise ModelError(
                f"the network of '{self.name}' gives values that are not finite; load its weights "
                "again, in single precision"
            )
        return nn.functional.normalize(found.float()).cpu()

    def __call__(
        self, generated: Tensor, references: Tensor, regions: Tensor | None = None
    ) -> Tensor:
        """See `CopySimilarity`; `regions` are not used.

        Raises:
            DataError: pictures of a wrong kind or number.
            ModelError: see `descriptors`.
        """
        if len(generated) != len(references):
            raise DataError(
                f"there are {len(generated)} generated pictures and {len(references)} references; "
                "give one reference for each, or use `matrix`"
            )
        return (self.descriptors(generated) * self.descriptors(references)).sum(1)

    def matrix(
        self, generated: Tensor, references: Tensor, regions: Tensor | None = None
    ) -> Tensor:
        """See `CopySimilarity`; `regions` are not used.

        Raises:
            DataError: pictures of a wrong kind.
            ModelError: see `descriptors`.
        """
        if not len(generated) or not len(references):
            return torch.zeros(len(generated), len(references))
        return self.descriptors(generated) @ self.descriptors(references).T

    def protocol(self) -> dict[str, Any]:
        """See `CopySimilarity`."""
        return {
            "name": self.name,
            "threshold": self.threshold,
            "size": self.size if isinstance(self.size, int) else list(self.size),
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            "weights": self.hash,
            "regions": "not used",
        }


# ---- SSCD ---------------------------------------------------------------------------------------

_PREPARATION: dict[str, dict[str, Any]] = {
    "nemo2024": {
        "size": (320, 320),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
    "wen2024": {"size": 256, "crop": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3},
}


class _GeneralisedMean(nn.Module):
    """Pooling over places by the mean of third powers: (B, C, h, w) to (B, C, 1, 1)."""

    def forward(self, features: Tensor) -> Tensor:
        """Pool."""
        return features.clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3)


def load_sscd(
    path: str | Path,
    preset: SSCDPreset = "nemo2024",
    allow_torchscript: bool = False,
    threshold: float = 0.7,
    batch_size: int = 64,
) -> DescriptorSimilarity:
    """Load a network of the SSCD family.

    Args:
        path: weights of the published ResNet-50 (``disc_mixup`` and its like), as safetensors or
            a plain state dict; or a TorchScript file of any of its networks.
        preset: how pictures are prepared: ``nemo2024``: resized to 320x320, ImageNet statistics,
            meant for ``disc_mixup``; ``wen2024``: shorter side 256, central 224x224, values in
            [-1, 1], meant for ``disc_large``. Values of the two cannot be compared.
        allow_torchscript: run the program that a TorchScript file is. Only for files from a source
            you trust.
        threshold: see `DescriptorSimilarity`.
        batch_size: see `DescriptorSimilarity`.

    Raises:
        ConfigurationError: an unknown preset.
        MissingFileError: there is no such file.
        WeightsError: TorchScript without consent, or a file that is damaged or does not fit.
    """
    if preset not in get_args(SSCDPreset):
        raise ConfigurationError(f"`preset` is '{preset}', {suggest(preset, get_args(SSCDPreset))}")
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"there is no SSCD file '{path}'; check the path")
    network: nn.Module
    if _is_torchscript(path):
        if not allow_torchscript:
            raise WeightsError(
                f"'{path}' is TorchScript, a program that runs when it is used, so it was not "
                "loaded; give the ResNet-50's weights as safetensors, or set "
                "`allow_torchscript=True` if you trust whoever made it"
            )
        try:
            network = torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            raise WeightsError(
                f"'{path}' cannot be read as TorchScript ({str(error).splitlines()[0]}); copy or "
                "download it again"
            ) from error
    else:
        network = _resnet(path)
    for parameter in network.parameters():  # a TorchScript module has no `requires_grad_`
        parameter.requires_grad_(False)
    return DescriptorSimilarity(
        network,
        name=f"sscd-{preset}",
        threshold=threshold,
        batch_size=batch_size,
        **_PREPARATION[preset],
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _resnet(path: Path) -> nn.Module:
    from torchvision.models import resnet50

    weights = read_weights(path)
    if all(name.startswith("backbone.") for name in weights):
        weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    last = weights.get("fc.weight")
    if last is None or last.ndim != 2:
        raise WeightsError(
            f"'{path}' has no matrix 'fc.weight', so it is no ResNet-50 of SSCD; use the "
            "TorchScript file for other networks"
        )
    network = resnet50(weights=None, num_classes=len(last))
    network.avgpool = _GeneralisedMean()
    put_weights(network, weights, path)
    return network


def load_similarity(name: str, **settings: Any) -> CopySimilarity:
    """Make a similarity by name.

    Args:
        name: ``ncc``, ``l2``, or the path of an SSCD file.
        settings: arguments of `NormalisedCorrelation`, `PixelDistance` or `load_sscd`.

    Raises:
        ConfigurationError: neither a known name nor a file, or an unknown or wrong setting.
        MissingFileError: there is no such file.
        WeightsError: see `load_sscd`.
    """
    makers: dict[str, Any] = {"ncc": NormalisedCorrelation, "l2": PixelDistance}
    if name not in makers and not Path(name).suffix and not Path(name).expanduser().is_file():
        raise ConfigurationError(
            f"`similarity` is '{name}', {suggest(name, SIMILARITIES)}; or give the path of an "
            "SSCD file"
        )
    maker = makers.get(name, load_sscd)
    positional = () if name in makers else (name,)
    try:
        return maker(*positional, **settings)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ConfigurationError(
            f"the similarity '{name}' does not take {', '.join(settings)} ({error}); see the "
            f"arguments of `{maker.__name__}`"
        ) from error


# ---- thresholds and memories --------------------------------------------------------------------


def copy_thresholds(
    similarity: CopySimilarity,
    images: Tensor,
    background: Tensor,
    regions: Tensor | None = None,
    floor: float | None = None,
) -> Tensor:
    r"""From which similarity on a picture is a copy of a training picture, one by one.

    :math:`\max(\text{floor},\ 1.05\,\max_b \text{sim}(b, x))` over unrelated pictures b: a sheet
    that resembles many others needs a higher one. Where the margin would lead beyond what a copy
    can reach, the middle between 1 and the background is taken.

    Args:
        similarity: how alike is measured.
        images: (N, 3, H, W) training pictures.
        background: (M, 3, H, W) pictures of the same kind that nobody has memorized; some
            thousands.
        regions: (N, H, W) bool, see `CopySimilarity`.
        floor: None takes the similarity's own threshold, 0.75 for ``ncc``.

    Returns:
        (N,) float32.

    Raises:
        DataError: no background, or one that contains a training picture.
    """
    if not len(background):
        raise DataError(
            "`background` is empty; give unrelated pictures of the same kind as the training ones"
        )
    least = similarity.threshold if floor is None else _checked_threshold(floor)
    nearest = similarity.matrix(background, images, regions).amax(0)
    same = (nearest >= 1 - 1e-5).nonzero().flatten().tolist()
    if same:
        raise DataError(
            f"`background` contains the training picture number {same[0]}; remove it, or nothing "
            "could count as a copy of it"
        )
    return torch.minimum(MARGIN * nearest, (1 + nearest) / 2).clamp(min=least)


def memory_thresholds(
    similarity: CopySimilarity,
    memorized: MemorizedSet,
    background: Tensor,
    floor: float | None = None,
) -> Tensor:
    """`copy_thresholds` per prompt, of its pictures the largest.

    Args:
        similarity: how alike is measured.
        memorized: prompts and pictures.
        background: (M, 3, H, W), see `copy_thresholds`.
        floor: see `copy_thresholds`.

    Returns:
        (P,) float32 in the order of the prompts; NaN for prompts without pictures.

    Raises:
        DataError: see `copy_thresholds`.
    """
    # Together, since a similarity may have to run a network over the whole background.
    groups: dict[Any, list[tuple[str, Tensor, Tensor | None]]] = {}
    for memory in _memories(memorized):
        groups.setdefault((memory[1].shape, memory[2] is None), []).append(memory)
    table: dict[str, float] = {}
    for group in groups.values():
        images = torch.stack([image for _, image, _ in group])
        parts = [region for _, _, region in group if region is not None]
        regions = torch.cat(parts) if parts else None
        values = copy_thresholds(similarity, images, background, regions, floor)
        table |= dict(zip([name for name, _, _ in group], values.tolist(), strict=True))
    own = [[table[name] for name in one.images] for one in memorized.prompts]
    return torch.tensor([max(values) if values else torch.nan for values in own])


def similarity_to_memories(
    similarity: CopySimilarity, images: Tensor, memorized: MemorizedSet, n: int
) -> Tensor:
    """How alike generated pictures are to the training pictures of their prompts.

    Args:
        similarity: how alike is measured.
        images: (P * n, 3, H, W) float in [0, 1], n pictures per prompt in the order of the
            prompts, as `DiffusionGenerator.generate` returns them.
        memorized: P prompts. Only the region of a template counts.
        n: pictures per prompt.

    Returns:
        (P, n) float32, of several training pictures of a prompt the largest value; NaN for prompts
        without pictures.

    Raises:
        DataError: not `n` pictures per prompt.
    """
    count = len(memorized)
    if n < 1 or len(images) != count * n:
        raise DataError(
            f"there are {len(images)} generated pictures for {count} prompts; give `n` = {n} for "
            "each"
        )
    found = torch.full((count, n), torch.nan)
    regions = {name: region for name, _, region in _memories(memorized)}
    for row, one in enumerate(memorized.prompts):
        own = images[row * n : (row + 1) * n]
        values = [
            similarity.matrix(own, memorized.images[name][None], regions[name])[:, 0]
            for name in one.images
        ]
        if values:
            found[row] = torch.stack(values).amax(0)
    return found


def _memories(memorized: MemorizedSet) -> list[tuple[str, Tensor, Tensor | None]]:
    """Name, picture and (1, H, W) region of all pictures that some prompt names."""
    names = dict.fromkeys(name for one in memorized.prompts for name in one.images)
    return [
        (name, memorized.images[name], None if region is None else region[None])
        for name in names
        for region in [memorized.regions.get(name)]
    ]


class ReplicationRate(Metric):
    """Share of prompts that bring their training picture back, over batches and processes.

    `compute` returns, over the prompts with at least one value:

    * ``rate``: share of prompts of which at least one picture reaches its threshold;
    * ``rate_mean``: mean over prompts of the share of their pictures that do;
    * ``mean``, ``median``, ``mad``: of the prompts' medians over their pictures; the last is the
      median absolute deviation;
    * ``prompts``, ``pictures``: how many counted; ``left_out``: pictures whose similarity is not a
      number, since their prompts have no training picture;
    * per prompt, in the order of the ids, ``ids``, ``best`` (largest similarity), ``medians`` and
      ``shares`` (of pictures that reach their threshold).
    """

    full_state_update = False
    higher_is_better = None
    similarities: list[Tensor]
    thresholds: list[Tensor]
    ids: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The type in which torchmetrics stands in for a process without pictures.
        self.set_dtype(torch.float64)
        for name in ("similarities", "thresholds", "ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, similarities: Tensor, thresholds: Tensor, ids: Tensor) -> None:
        """Add pictures.

        Args:
            similarities: (B,) to the training picture; NaN where there is none.
            thresholds: (B,) from which on it is a copy.
            ids: (B,) integers below 2^53, the prompts.

        Raises:
            DataError: different numbers of them, or a similarity without a threshold.
        """
        shapes = {tuple(part.shape) for part in (similarities, thresholds, ids)}
        if len(shapes) != 1 or similarities.ndim != 1:
            raise DataError(
                f"there are similarities {tuple(similarities.shape)}, thresholds "
                f"{tuple(thresholds.shape)} and ids {tuple(ids.shape)}; give one of each per "
                "picture, (B,)"
            )
        if bool((thresholds.isnan() & ~similarities.isnan()).any()):
            raise DataError(
                "a picture has a similarity but its threshold is not a number; give a threshold "
                "for every prompt with a training picture"
            )
        if len(similarities):
            self.similarities.append(similarities.to(self.device, torch.float64))
            self.thresholds.append(thresholds.to(self.device, torch.float64))
            self.ids.append(ids.to(self.device, torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """Return the values that are listed above.

        Raises:
            DataError: no prompt has a value.
        """
        if not len(self.ids):
            raise DataError("the replication rate has seen no pictures; update it before `compute`")
        values, limits, ids = map(dim_zero_cat, (self.similarities, self.thresholds, self.ids))
        counted = ~values.isnan()
        values, limits = values[counted], limits[counted]
        prompts, owner = ids[counted].unique(return_inverse=True)
        if not len(prompts):
            raise DataError(
                "no prompt has a training picture, so that nothing can be called a copy; give "
                "pictures with the memorized prompts"
            )
        hits = (values >= limits).double()
        per_prompt = [(values[owner == row], hits[owner == row]) for row in range(len(prompts))]
        medians = torch.stack([own.quantile(0.5) for own, _ in per_prompt])
        shares = torch.stack([hit.mean() for _, hit in per_prompt])
        middle = medians.quantile(0.5)
        return {
            "rate": (shares > 0).double().mean(),
            "rate_mean": shares.mean(),
            "mean": medians.mean(),
            "median": middle,
            "mad": (medians - middle).abs().quantile(0.5),
            "prompts": torch.tensor(len(prompts)),
            "pictures": counted.sum(),
            "left_out": (~counted).sum(),
            "ids": prompts.long(),
            "best": torch.stack([own.amax() for own, _ in per_prompt]),
            "medians": medians,
            "shares": shares,
        }


# ---- checks -------------------------------------------------------------------------------------


def _checked_threshold(value: float) -> float:
    if not 0 < value <= 1:
        raise ConfigurationError(f"`threshold` is {value}, it must be above 0 and at most 1")
    return float(value)


def _check_pictures(what: str, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise DataError(
            f"the {what} are {tuple(images.shape)} {images.dtype}; they must be (B, 3, H, W) float "
            "in [0, 1]"
        )
    if images.numel() and not bool(images.isfinite().all()):
        raise DataError(f"the {what} have values that are not finite; leave such pictures out")
    if images.numel() and (float(images.min()) < -1e-4 or float(images.max()) > 1 + 1e-4):
        raise DataError(
            f"the {what} have values from {float(images.min()):.3g} to {float(images.max()):.3g}; "
            "scale them to [0, 1]"
        )


def _check_same_size(generated: Tensor, references: Tensor, regions: Tensor | None) -> None:
    _check_pictures("generated pictures", generated)
    _check_pictures("references", references)
    if generated.shape[1:] != references.shape[1:]:
        raise DataError(
            f"the generated pictures have {generated.shape[2]}x{generated.shape[3]} pixels, the "
            f"references {references.shape[2]}x{references.shape[3]}; resize the references"
        )
    if regions is None:
        return
    wanted = (len(references), *references.shape[2:])
    if regions.dtype != torch.bool or tuple(regions.shape) != wanted:
        raise DataError(
            f"`regions` is {tuple(regions.shape)} {regions.dtype}; it must be {wanted} bool, one "
            "per reference"
        )
    if not bool(regions.flatten(1).any(1).all()):
        raise DataError("a region is empty; mark the part of the reference that counts")


def _centred(images: Tensor, regions: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, D) values minus their mean within the region, 0 outside, and (B,) lengths.

    The length of a constant picture is infinite, which makes its correlations 0.
    """
    inside = torch.ones_like(images[:1, :1], dtype=torch.float64)
    if regions is not None:
        inside = regions[:, None].to(inside)
    inside = inside.expand(-1, 3, -1, -1).flatten(1)
    values, count = images.double().flatten(1), inside.sum(1, keepdim=True)
    mean = (values * inside).sum(1, keepdim=True) / count
    centred = (values - mean) * inside
    size = centred.norm(dim=1)
    return centred, size.where(size > _CONSTANT * count[:, 0].sqrt(), torch.inf)
