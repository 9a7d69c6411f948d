"""Which single weights of a network are taken out: kept, compared, applied, taken back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, MissingFileError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.weight_edit import WeightEdit, base_facts, network_of

FORMAT_VERSION = 1
MASK_FILE = "mmforget_mask.safetensors"
HEADER = "mmforget_mask"
"""Key of our JSON in the header of a safetensors file."""

Unit = Literal["weight", "column", "row"]
"""What a mask was chosen by: single weights, whole inputs (columns) or whole outputs (rows)."""

Places = tuple[Tensor, ...]
"""Indices of single entries, one tensor per dimension."""


@dataclass(frozen=True)
class Agreement:
    """How much two masks overlap.

    Attributes:
        layers: intersection over union per parameter, 0 to 1; NaN where both masks are empty.
        chance: what two random masks with the same counts per row have in expectation (the ratio
            of expected intersection and expected union); NaN where both are empty.
    """

    layers: dict[str, float]
    chance: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over the parameters that are not empty in both; NaN if all are."""
        return _mean(self.layers)

    @property
    def mean_chance(self) -> float:
        """The same mean of `chance`."""
        return _mean(self.chance)


def _mean(values: Mapping[str, float]) -> float:
    found = torch.tensor(list(values.values()), dtype=torch.float64)
    return float(found.nanmean())


class Removed:
    """What `WeightMask.apply` took out of a network; gives it back bit by bit.

    Also a context manager: the weights are back at its end.

    Args:
        taken: parameters, with the places that were changed and the values that were there.
    """

    def __init__(self, taken: Sequence[tuple[Tensor, Places, Tensor]]) -> None:
        self._taken = list(taken)

    @property
    def count(self) -> int:
        """Number of weights that were taken out and are not back yet."""
        return sum(len(values) for _, _, values in self._taken)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back; a second call does nothing."""
        for weight, places, values in self._taken:
            weight.data[places] = values.to(weight)  # it may have moved since
        self._taken = []

    def __enter__(self) -> Self:
        """The weights are out."""
        return self

    def __exit__(self, *_: object) -> None:
        """Put them back."""
        self.restore()


@dataclass
class WeightMask:
    """A choice of weights of one network.

    Args:
        component: attribute of the pipeline that holds the network, ``unet`` or ``transformer``.
        masks: per parameter name a bool tensor in the parameter's shape, on the CPU.
        metadata: plain data. `described` fills in what belongs to the network; locators add their
            settings. ``columns`` gives per parameter the (start, stop) of the inputs that could be
            chosen at all, ``unit`` what was chosen, see `Unit`.

    Raises:
        WeightsError: no masks, or one that is not bool.
    """

    component: str
    masks: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.masks:
            raise WeightsError(
                "a weight mask without parameters chooses nothing; give at least one"
            )
        for name, mask in self.masks.items():
            if mask.dtype != torch.bool:
                raise WeightsError(
                    f"the mask of '{name}' is {mask.dtype}, it must be torch.bool; NaN and numbers "
                    "have no meaning in it"
                )
        self.masks = {name: mask.detach().cpu() for name, mask in self.masks.items()}

    @classmethod
    def described(
        cls, model: Any, masks: Mapping[str, Tensor], base_hash: str, **facts: Any
    ) -> WeightMask:
        """A mask with what must be known to apply it later.

        Args:
            model: a `DiffusionGenerator`, whose network the mask belongs to.
            masks: per parameter name.
            base_hash: `state_hash` of the network that the mask was made for.
            facts: further metadata.
        """
        network = model.network
        metadata = {
            **base_facts(model, base_hash),
            "config_hash": config_hash(network),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            **facts,
        }
        return cls(model.component, dict(masks), metadata)

    # ---- what it chooses ------------------------------------------------------------------------

    @property
    def unit(self) -> Unit:
        """What was chosen: weights, columns or rows."""
        found: Unit = self.metadata.get("unit", "weight")
        return found

    @property
    def count(self) -> int:
        """Number of chosen weights."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def columns(self, name: str) -> slice:
        """Inputs of a parameter that could be chosen; all, unless the metadata say otherwise."""
        start, stop = self.metadata.get("columns", {}).get(name, (0, self.masks[name].shape[-1]))
        return slice(int(start), int(stop))

    def density(self) -> dict[str, Any]:
        """Shares of chosen weights, 0 to 1.

        Returns:
            ``layers``: per parameter, of the columns that could be chosen; ``chosen_layers``: of
            all these together; ``network``: of all parameters, None if their number is unknown.
        """
        layers, possible = {}, 0
        for name, mask in self.masks.items():
            part = mask[..., self.columns(name)]
            layers[name] = float(part.sum()) / part.numel()
            possible += part.numel()
        whole = self.metadata.get("parameters")
        return {
            "layers": layers,
            "chosen_layers": self.count / possible,
            "network": self.count / whole if whole else None,
        }

    def iou(self, other: WeightMask) -> Agreement:
        """Compare with another mask of the same network.

        Args:
            other: may lack layers; they count as empty.

        Raises:
            WeightsError: a parameter has another shape there.
        """
        layers, chance = {}, {}
        for name in sorted(self.masks.keys() | other.masks.keys()):
            mine, theirs = self._beside(other, name)
            union = int((mine | theirs).sum())
            layers[name] = int((mine & theirs).sum()) / union if union else float("nan")
            owner = self if name in self.masks else other
            part = owner.columns(name)
            a, b = (m[..., part].sum(-1, dtype=torch.float64) for m in (mine, theirs))
            both = a * b / (part.stop - part.start)
            expected = float((a + b - both).sum())
            chance[name] = float(both.sum()) / expected if expected else float("nan")
        return Agreement(layers, chance)

    def union(self, other: WeightMask) -> WeightMask:
        """What either chooses; keeps the metadata of this one.

        Raises:
            WeightsError: see `iou`.
        """
        return self._joined(other, torch.logical_or)

    def intersection(self, other: WeightMask) -> WeightMask:
        """What both choose; keeps the metadata of this one.

        Raises:
            WeightsError: see `iou`.
        """
        return self._joined(other, torch.logical_and)

    def _joined(self, other: WeightMask, how: Callable[[Tensor, Tensor], Tensor]) -> WeightMask:
        names = [*self.masks, *(name for name in other.masks if name not in self.masks)]
        masks = {name: how(*self._beside(other, name)) for name in names}
        metadata = dict(self.metadata)
        columns = other.metadata.get("columns", {}) | self.metadata.get("columns", {})
        if columns:
            metadata["columns"] = columns
        if self.unit != other.unit:
            metadata["unit"] = "weight"
        return WeightMask(self.component, masks, metadata)

    def _beside(self, other: WeightMask, name: str) -> tuple[Tensor, Tensor]:
        if self.component != other.component:
            raise WeightsError(
                f"one mask belongs to the {self.component}, the other to the {other.component}; "
                "compare masks of the same network"
            )
        mine, theirs = self.masks.get(name), other.masks.get(name)
        one = mine if mine is not None else torch.zeros_like(other.masks[name])
        two = theirs if theirs is not None else torch.zeros_like(one)
        if one.shape != two.shape:
            raise WeightsError(
                f"'{name}' is {tuple(one.shape)} in one mask and {tuple(two.shape)} in the other; "
                "compare masks of the same network"
            )
        return one, two

    # ---- application ----------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, model: Any, factor: float = 0.0, check_base: bool = True) -> Removed:
        """Multiply the chosen weights in place; everything else stays bit by bit as it is.

        Args:
            model: a pipeline, a `DiffusionGenerator`, or the network itself.
            factor: 0 takes the weights out, 0.5 halves them.
            check_base: refuse a network other than the one that the mask was made for, by its
                configuration and its weights. Switch it off for one that was trained on since.

        Returns:
            What was taken out, sparse; ``restore()`` gives it back.

        Raises:
            ConfigurationError: `factor` below 0, or 1 and more.
            WeightsError: another network, an unknown parameter, a shape that does not fit, chosen
                values that are not finite; nothing is changed then.
        """
        if not 0 <= factor < 1:
            raise ConfigurationError(
                f"`factor` is {factor}, it must be at least 0 and below 1; 0 takes weights out"
            )
        network = network_of(model, self.component)
        if check_base:
            self.check_base(network)
        targets = self._targets(network)
        taken: list[tuple[Tensor, Places, Tensor]] = []
        for name, weight in targets.items():
            places = self.masks[name].nonzero(as_tuple=True)
            values = weight.data[places]
            if not torch.isfinite(values).all():
                raise WeightsError(
                    f"'{name}' has chosen values that are not finite; the model is damaged, load "
                    "it again"
                )
            taken.append((weight, places, values))
        for target, places, values in taken:
            # Written as zero, since a negative number times zero would leave a minus sign.
            target.data[places] = values * factor if factor else torch.zeros_like(values)
        return Removed(taken)

    def check_base(self, network: nn.Module) -> None:
        """Refuse a network other than the one that the mask was made for.

        Raises:
            WeightsError: says how to go on.
        """
        wanted = self.metadata.get("config_hash")
        if wanted and config_hash(network) != wanted:
            raise WeightsError(
                "the mask was made for another network: the configuration of this "
                f"{type(network).__name__} differs from the one it was located in; load that model"
            )
        self._targets(network)
        wanted = self.metadata.get("base_hash")
        if wanted and state_hash(network) != wanted:
            raise WeightsError(
                f"the mask was made for another network: the weights of the {self.component} "
                "differ from those it was located in; load the original in its original "
                "precision, or pass check_base=False"
            )

    def _targets(self, network: nn.Module) -> dict[str, nn.Parameter]:
        found = {}
        for name, mask in self.masks.items():
            try:
                weight = network.get_parameter(name)
            except AttributeError as error:
                raise WeightsError(
                    f"the mask chooses from '{name}', which {type(network).__name__} does not "
                    "have; it was made for another network"
                ) from error
            if weight.shape != mask.shape:
                raise WeightsError(
                    f"the mask of '{name}' is {tuple(mask.shape)}, the network's weight is "
                    f"{tuple(weight.shape)}; it was made for another network"
                )
            found[name] = weight
        return found

    @torch.no_grad()
    def weight_edit(self, model: Any, factor: float = 0.0) -> WeightEdit:
        """The same change as whole parameters, for programs that know nothing of masks.

        Args:
            model: as for `apply`, with the weights that the mask was made for.
            factor: as for `apply`.

        Raises:
            WeightsError: a parameter that is unknown or has another shape.
        """
        network = network_of(model, self.component)
        with self.apply(network, factor, check_base=False):
            changed = {n: w.detach().cpu().clone() for n, w in self._targets(network).items()}
        return WeightEdit(self.component, tensors=changed, metadata=dict(self.metadata))

    # ---- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the mask, one bit per weight, with its metadata.

        Args:
            path: a ``.safetensors`` file, or a folder, in which it is called
                ``mmforget_mask.safetensors``.

        Returns:
            The file.
        """
        file = Path(path)
        if file.suffix != ".safetensors":
            file = file / MASK_FILE
        header = {
            "format_version": FORMAT_VERSION,
            "component": self.component,
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
            "metadata": self.metadata,
        }
        packed = {
            name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in self.masks.items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.saving")  # so that no half file is ever left
        save_file(packed, fresh, metadata={HEADER: json.dumps(header, ensure_ascii=False)})
        fresh.replace(file)
        return file

    @classmethod
    def load(cls, path: str | Path) -> WeightMask:
        """Read a mask that `save` wrote.

        Args:
            path: the file, or a folder with ``mmforget_mask.safetensors``.

        Raises:
            MissingFileError: there is no such file.
            WeightsError: a broken or truncated file, another kind of file or format version.
        """
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / MASK_FILE
        if not file.is_file():
            raise MissingFileError(f"there is no weight mask '{file}'; check the path")
        try:
            with safe_open(file, framework="pt", device="cpu") as content:  # type: ignore[no-untyped-call]
                raw = content.metadata() or {}
                packed = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            header = json.loads(raw[HEADER]) if HEADER in raw else None
        except (SafetensorError, json.JSONDecodeError, OSError, UnicodeDecodeError) as error:
            raise WeightsError(
                f"'{file}' is no intact safetensors file ({str(error).splitlines()[0]}); copy it "
                "again"
            ) from error
        if header is None:
            raise WeightsError(f"'{file}' holds no weight mask of mmforget; choose another file")
        if header.get("format_version") != FORMAT_VERSION:
            raise WeightsError(
                f"'{file}' has format version {header.get('format_version')}, this mmforget reads "
                f"{FORMAT_VERSION}; update mmforget, or locate again"
            )
        shapes: dict[str, Sequence[int]] = header["shapes"]
        masks = {}
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            bits = packed.get(name)
            if bits is None or bits.dtype != torch.uint8 or len(bits) != -(-size // 8):
                raise WeightsError(
                    f"'{file}' does not hold the mask of '{name}' that its header promises; copy "
                    "it again"
                )
            flat = np.unpackbits(bits.numpy(), count=size).astype(bool)
            masks[name] = torch.from_numpy(flat).reshape(tuple(shape))
        return cls(header["component"], masks, header["metadata"])


def config_hash(network: Any) -> str:
    """SHA-256 over the class of a network and the settings that it was built with.

    Args:
        network: of diffusers; one without a configuration is told by its parameters' shapes.
    """
    config = getattr(network, "config", None)
    if config is not None:
        # Underscored entries say where it was loaded from and with which version.
        facts: Any = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    else:
        facts = {name: list(value.shape) for name, value in network.named_parameters()}
    text = json.dumps([type(network).__name__, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
