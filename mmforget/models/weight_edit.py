"""A change of weights as a thing of its own: kept, scaled, stacked, exported, applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, MissingFileError, WeightsError, suggest
from mmforget.models.base import state_hash

FORMAT_VERSION = 1
EDIT_FILE = "mmforget_edit.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
HEADER = "mmforget"
"""Key of our JSON in the header of a safetensors file."""

A, B = ".lora_A.weight", ".lora_B.weight"
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
KOHYA = "lora_unet_"
COMPONENTS = ("unet", "transformer")

KOHYA_NAMES: Mapping[str, Mapping[str, str]] = {
    "SDXL": {"add_embedding.linear_1": "label_emb_0_0"},
    "Stable Diffusion 3": {"time_text_embed.text_embedder.linear_1": "y_embedder_mlp_0"},
    "FLUX": {
        "context_embedder": "txt_in",
        "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
    },
}
"""Layers outside the blocks that kohya's trainers call otherwise than diffusers, per family."""

Naming = Literal["diffusers", "kohya"]


@dataclass
class WeightEdit:
    """What a method changed in one network.

    Args:
        component: attribute of the pipeline that holds the network, ``unet`` or ``transformer``.
        factors: per layer name ``(up, down)`` of shapes (out, r) and (r, in): the weight changes by
            ``up @ down``. For a convolution, `down` is (r, in, height, width). If `down` has fewer
            columns than the layer, it acts on the leading ones. Empty for ``replace``.
        tensors: per parameter name its new value. Empty for ``lora``.
        metadata: plain data: method, version, concepts, base model and its hash, settings, seed.

    Raises:
        WeightsError: both or neither of `factors` and `tensors`, or factors that do not fit.

    Example:
        >>> edit = WeightEdit("unet", {"proj": (torch.ones(4, 1), torch.ones(1, 3))})
        >>> edit.kind, edit.size_bytes
        ('lora', 28)
    """

    component: str
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.factors) == bool(self.tensors):
            raise WeightsError(
                "a weight edit holds either low-rank factors or whole tensors; this one holds "
                + ("both" if self.factors else "none, so that it would change nothing")
            )
        for name, (up, down) in self.factors.items():
            if up.ndim != 2 or down.ndim not in (2, 4) or up.shape[1] != down.shape[0]:
                raise WeightsError(
                    f"the factors of '{name}' are {tuple(up.shape)} and {tuple(down.shape)}; they "
                    "must be (out, r) and (r, in)"
                )

    @property
    def kind(self) -> Literal["lora", "replace"]:
        """``lora`` for low-rank factors, ``replace`` for whole parameters."""
        return "lora" if self.factors else "replace"

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors; a `down` that several layers share counts once."""
        return sum(t.numel() * t.element_size() for t in self._named()[0].values())

    @property
    def rank(self) -> int:
        """Largest rank of a layer; 0 for whole parameters."""
        return max((up.shape[1] for up, _ in self.factors.values()), default=0)

    def _named(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors by name, and for layers that share another one's `down`, the name of that one.

        Closed-form edits give all layers with the same input the same `down`.
        """
        if self.tensors:
            return dict(self.tensors), {}
        named: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        owner: dict[int, str] = {}
        for layer, (up, down) in self.factors.items():
            named[f"{layer}{B}"] = up
            first = owner.setdefault(id(down), layer)
            if first == layer:
                named[f"{layer}{A}"] = down
            else:
                shared[layer] = first
        return named, shared

    # ---- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the edit with its metadata into one safetensors file.

        Args:
            path: a ``.safetensors`` file, or a folder, in which it is called
                ``mmforget_edit.safetensors``.

        Returns:
            The file.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / EDIT_FILE
        tensors, shared = self._named()
        own = {
            "format_version": FORMAT_VERSION,
            "component": self.component,
            "kind": self.kind,
            "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "shared": shared,
        }
        header = json.dumps({**self.metadata, **own}, ensure_ascii=False)
        _write(path, tensors, {HEADER: header})
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> WeightEdit:
        """Read an edit that `save` or `save_lora` wrote, or a LoRA of the denoiser by others.

        Args:
            path: the file, or a folder with one.
            model: a pipeline, `DiffusionGenerator` or network, whose layer names resolve the
                abbreviated ones of a kohya file. Only needed if mmforget did not write it.

        Raises:
            MissingFileError: there is no such file.
            WeightsError: broken or truncated, a pickle, another format version, a tensor that is
                missing, unknown or misshapen.
        """
        file = find_file(path)
        tensors, header = _read(file)
        if "format_version" in header and header.get("naming") is None:
            return cls._from_own(file, tensors, header)
        return cls._from_lora(file, tensors, header, model)

    @classmethod
    def _from_own(cls, file: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if found != header["shapes"]:
            odd = sorted(k for k in found.keys() | header["shapes"].keys()
                         if found.get(k) != header["shapes"].get(k))  # fmt: skip
            raise WeightsError(
                f"'{file}' does not hold the tensors that its header promises ('{odd[0]}'); "
                "copy it again"
            )
        skipped = ("format_version", "component", "kind", "shapes", "shared")
        metadata = {key: value for key, value in header.items() if key not in skipped}
        if header["kind"] == "replace":
            return cls(header["component"], tensors=tensors, metadata=metadata)
        for layer, first in header["shared"].items():
            tensors[f"{layer}{A}"] = tensors[f"{first}{A}"]
        return cls(header["component"], _paired(file, tensors, A, B), {}, metadata)

    @classmethod
    def _from_lora(
        cls, file: Path, tensors: dict[str, Tensor], header: dict[str, Any], model: Any
    ) -> WeightEdit:
        metadata = {k: v for k, v in header.items() if k not in ("format_version", "naming")}
        if all(name.startswith(KOHYA) for name in tensors):
            short = _paired(file, tensors, DOWN, UP)
            table = metadata.pop("layers", None) or _kohya_table(file, model)
            unknown = sorted(name for name in short if name not in table)
            if unknown:
                raise WeightsError(
                    f"'{file}' changes '{unknown[0]}', which the model does not have; it was made "
                    "for another base"
                )
            component = metadata.pop("component", None) or component_of(model)
            return cls(component, {table[n]: pair for n, pair in short.items()}, {}, metadata)
        component = next((c for c in COMPONENTS if any(n.startswith(f"{c}.") for n in tensors)), "")
        strange = sorted(n for n in tensors if not component or not n.startswith(f"{component}."))
        if strange:
            raise WeightsError(
                f"'{file}' holds '{strange[0]}', which is no LoRA of a denoiser; expected are "
                f"names such as 'unet.<layer>{A}'"
            )
        plain = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
        alphas = _alphas(header.get("lora_adapter_metadata"), component)
        metadata.pop("lora_adapter_metadata", None)
        metadata.pop("component", None)
        return cls(component, _paired(file, plain, A, B, alphas), {}, metadata)

    def save_lora(self, folder: str | Path, naming: Naming = "diffusers") -> Path:
        """Write a LoRA that other programs load.

        Args:
            folder: gets ``pytorch_lora_weights.safetensors``.
            naming: ``diffusers`` for ``pipe.load_lora_weights(folder)``, with every family and
                layer; ``kohya`` for WebUI and ComfyUI. ``load_lora_weights`` takes kohya files for
                Stable Diffusion 1, 2 and XL; for Stable Diffusion 3 and FLUX it skips the layers
                that read text without a word, so use `load_lora` there, which takes all.

        Returns:
            The file.

        Raises:
            ConfigurationError: whole parameters instead of factors, or an unknown naming.
        """
        if naming not in ("diffusers", "kohya"):
            raise ConfigurationError(
                f"`naming` is '{naming}', {suggest(naming, ('diffusers', 'kohya'))}"
            )
        if not self.factors:
            raise ConfigurationError(
                "this edit replaces whole parameters, a LoRA holds low-rank factors; call "
                "`edit.to_lora(model, rank)` first"
            )
        file = Path(folder) / LORA_FILE
        own = {**self.metadata, "format_version": FORMAT_VERSION, "component": self.component,
               "naming": naming}  # fmt: skip
        if naming == "diffusers":
            tensors = self.lora_state_dict()
            config = {f"{self.component}.{k}": v for k, v in _peft_config(self.factors).items()}
            header = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        else:
            special = KOHYA_NAMES.get(self.metadata.get("family", ""), {})
            tensors, layers, header = {}, {}, {}
            # One alpha for all: diffusers loses those of single layers when it reads such a file.
            alpha = float(self.rank)
            for layer, (up, down) in self._full_width().items():
                short = KOHYA + special.get(layer, layer.replace(".", "_"))
                layers[short] = layer
                scaled = up if up.shape[1] == alpha else up * (up.shape[1] / alpha)
                tensors[short + DOWN] = down
                tensors[short + UP] = scaled if down.ndim == 2 else scaled[:, :, None, None]
                tensors[short + ALPHA] = torch.tensor(alpha)
            own["layers"] = layers
        _write(file, tensors, {**header, HEADER: json.dumps(own, ensure_ascii=False)})
        return file

    def lora_state_dict(self) -> dict[str, Tensor]:
        """Factors under the names that ``pipe.load_lora_weights`` takes."""
        tensors = {}
        for layer, (up, down) in self._full_width().items():
            tensors[f"{self.component}.{layer}{A}"] = down
            tensors[f"{self.component}.{layer}{B}"] = up if down.ndim == 2 else up[:, :, None, None]
        return tensors

    def _full_width(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors with as many columns as the layers have, where that is known."""
        widths = self.metadata.get("widths", {})
        full = {}
        for layer, (up, down) in self.factors.items():
            missing = widths.get(layer, down.shape[1]) - down.shape[1]
            full[layer] = (up, torch.nn.functional.pad(down, (0, missing)) if missing else down)
        return full

    # ---- application ----------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, model: Any, scale: float = 1.0, check_base: bool = True) -> None:
        """Change the weights in place, computed in double precision and cast back.

        Args:
            model: a pipeline, a `DiffusionGenerator`, or the network itself.
            scale: 1 is the whole edit, 0.5 half of it, -1 takes a low-rank edit back.
            check_base: refuse a network whose weights are not those that the edit was made for.
                Switch it off to stack edits, or for the same model in another precision.

        Raises:
            WeightsError: another base, an unknown layer, a shape that does not fit, values that
                are not finite; nothing is changed then.
        """
        network = network_of(model, self.component)
        if check_base:
            self.check_base(network)
        changes: list[tuple[Tensor, Tensor]] = []
        for name, (layer_up, layer_down) in self.factors.items():
            weight = self._target(network, f"{name}.weight")
            delta = self._delta(name, weight, layer_up, layer_down)
            new = weight.to(delta)
            if delta.shape == weight.shape:
                new = new + scale * delta
            else:
                new[:, : delta.shape[1]] += scale * delta
            changes.append((weight, new))
        for name, tensor in self.tensors.items():
            weight = self._target(network, name)
            if weight.shape != tensor.shape:
                raise WeightsError(
                    f"the edit of '{name}' is {tuple(tensor.shape)}, the network's is "
                    f"{tuple(weight.shape)}; it was made for another base"
                )
            new = tensor.to(weight.device)
            if scale != 1:
                precise = _precise(weight.device)
                new = torch.lerp(weight.to(precise), new.to(precise), scale)
            changes.append((weight, new))
        for (weight, new), name in zip(changes, self.factors or self.tensors, strict=True):
            if not torch.isfinite(new.to(weight.dtype)).all():
                raise WeightsError(
                    f"the edit of '{name}' gives values that are not finite in "
                    f"{str(weight.dtype).removeprefix('torch.')}; use a smaller `scale`"
                )
        for weight, new in changes:
            weight.copy_(new)

    def check_base(self, network: nn.Module) -> None:
        """Refuse a network whose weights are not those that the edit was made for.

        Raises:
            WeightsError: says how to go on.
        """
        wanted = self.metadata.get("base_hash")
        if wanted and state_hash(network) != wanted:
            raise WeightsError(
                "the edit was made for another base: the weights of the "
                f"{self.component} differ from those it was computed from; load the original in "
                "its original precision, or pass check_base=False"
            )

    @staticmethod
    def _target(network: nn.Module, name: str) -> Tensor:
        try:
            return network.get_parameter(name)
        except AttributeError as error:
            raise WeightsError(
                f"the edit changes '{name}', which {type(network).__name__} does not have; it was "
                "made for another base"
            ) from error

    @staticmethod
    def _delta(name: str, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if not weight.is_floating_point():
            raise WeightsError(
                f"the layer '{name}' is quantised ({weight.dtype}); load the pipeline without "
                "quantisation"
            )
        narrow = weight.ndim == 2 and down.ndim == 2 and down.shape[1] < weight.shape[1]
        inner = down.shape[1:] if not narrow else weight.shape[1:]
        if (up.shape[0], *inner) != tuple(weight.shape):
            raise WeightsError(
                f"the edit of '{name}' has factors {tuple(up.shape)} and {tuple(down.shape)} for a "
                f"weight {tuple(weight.shape)}; it was made for another base"
            )
        precise = _precise(weight.device)
        delta = up.to(weight.device, precise) @ down.to(weight.device, precise).flatten(1)
        return delta.reshape(len(up), *down.shape[1:])

    @torch.no_grad()
    def to_lora(self, model: Any, rank: int, check_base: bool = True) -> WeightEdit:
        """The nearest edit of a given rank, by truncated singular value decomposition.

        Args:
            model: pipeline, `DiffusionGenerator` or network with the original weights.
            rank: of every layer, at least 1; a layer that needs less gets less.
            check_base: see `apply`.

        Returns:
            An edit of kind ``lora`` with ``metadata["relative_error"]``: Frobenius norm of what is
            missing over that of the whole change; 0 is exact.

        Raises:
            ConfigurationError: `rank` below 1.
            WeightsError: another base, nothing changed, or a parameter that is no weight matrix
                changed (biases and norms have no low-rank form).
        """
        if rank < 1:
            raise ConfigurationError(f"`rank` is {rank}, it must be at least 1")
        network = network_of(model, self.component)
        if check_base:
            self.check_base(network)
        factors, missing, total = {}, 0.0, 0.0
        for name, delta in self._deltas(network):
            if not delta.any():
                continue
            if delta.ndim not in (2, 4) or not name.endswith(".weight"):
                raise WeightsError(
                    f"the edit changes '{name}', which has no low-rank form; keep it as it is, or "
                    "train with a choice of layers without biases and norms"
                )
            u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            kept = min(rank, int((s > 1e-7 * s[0]).sum()))
            root = s[:kept].sqrt()
            down = (root[:, None] * vh[:kept]).reshape(kept, *delta.shape[1:])
            pair = (u[:, :kept] * root).float().contiguous(), down.float().contiguous()
            factors[name.removesuffix(".weight")] = pair
            missing += float(s[kept:].square().sum())
            total += float(s.square().sum())
        if not factors:
            raise WeightsError("the edit equals the base, so that there is nothing to convert")
        error = (missing / total) ** 0.5
        return WeightEdit(self.component, factors, {}, {**self.metadata, "relative_error": error})

    def _deltas(self, network: nn.Module) -> list[tuple[str, Tensor]]:
        deltas = []
        for name, tensor in self.tensors.items():
            weight = self._target(network, name)
            if weight.shape != tensor.shape:
                raise WeightsError(
                    f"the edit of '{name}' is {tuple(tensor.shape)}, the network's is "
                    f"{tuple(weight.shape)}; it was made for another base"
                )
            precise = _precise(weight.device)
            deltas.append((name, tensor.to(weight.device, precise) - weight.to(precise)))
        for name, (up, down) in self.factors.items():
            weight = self._target(network, f"{name}.weight")
            deltas.append((f"{name}.weight", self._delta(name, weight, up, down)))
        return deltas


def load_lora(
    pipeline: Any, path: str | Path, name: str = "mmforget", check_base: bool = True
) -> None:
    """Attach a LoRA to a pipeline so that it can be scaled, stacked and switched off.

    Unlike ``pipe.load_lora_weights``, which skips what it does not know, this checks that every
    tensor has arrived.

    Args:
        pipeline: a diffusers pipeline, or a `DiffusionGenerator`.
        path: LoRA of any naming, or an edit of mmforget with low-rank factors; file or folder.
        name: of the adapter, for ``pipe.set_adapters(name, 0.5)`` and ``pipe.disable_lora()``.
        check_base: refuse weights other than those that the LoRA was made for, where it says.

    Raises:
        ConfigurationError: the name is taken.
        MissingFileError: there is no such file.
        WeightsError: a broken file, a tensor that was not consumed, another base.
    """
    pipe = getattr(pipeline, "pipeline", pipeline)
    parts = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module)}
    if any(name in getattr(part, "peft_config", {}) for part in parts.values()):
        raise ConfigurationError(f"`name` is '{name}', which is taken; choose another")
    file = find_file(path)
    tensors, _ = _read(file)
    foreign = any(n.startswith(("text_encoder", "lora_te")) for n in tensors)
    if foreign:
        wanted = _load_foreign(pipe, file, name)
    else:
        edit = WeightEdit.load(file, pipe)
        if not edit.factors:
            raise WeightsError(
                f"'{file}' replaces whole parameters; use `WeightEdit.load(path).apply(pipeline)`, "
                "or convert it with `to_lora`"
            )
        network = network_of(pipe, edit.component)
        if check_base and not getattr(network, "peft_config", None):
            edit.check_base(network)
        for layer, (up, down) in edit.factors.items():
            edit._delta(layer, edit._target(network, f"{layer}.weight"), up, down)
        wanted = edit.lora_state_dict()
        pipe.load_lora_weights(dict(wanted), adapter_name=name)
    arrived = {
        f"{key}.{parameter.replace(f'.{name}.weight', '.weight')}": value
        for key, part in parts.items()
        for parameter, value in part.named_parameters()
        if f".{name}.weight" in parameter
    }
    lost = sorted(
        key
        for key, value in wanted.items()
        if key not in arrived
        or not torch.equal(value.to(arrived[key].device, arrived[key].dtype), arrived[key])
    )
    if lost:
        pipe.delete_adapters(name)
        raise WeightsError(
            f"'{file}' holds '{lost[0]}', which the pipeline did not take; it was made for "
            "another base"
        )


def _load_foreign(pipe: Any, file: Path, name: str) -> dict[str, Tensor]:
    """Let diffusers convert and load a LoRA that also changes text encoders."""
    try:
        converted = pipe.lora_state_dict(str(file))
        converted = converted[0] if isinstance(converted, tuple) else converted
        pipe.load_lora_weights(str(file), adapter_name=name)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"diffusers cannot load the LoRA '{file}': {first}") from error
    return {k: v for k, v in converted.items() if k.endswith((A, B))}


# ---- reading and writing ------------------------------------------------------------------------


def find_file(path: str | Path) -> Path:
    """The file that a path means: itself, or the edit or LoRA in a folder.

    Raises:
        MissingFileError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        for name in (EDIT_FILE, LORA_FILE):
            if (path / name).is_file():
                return path / name
        others = sorted(path.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        raise MissingFileError(f"'{path}' holds no {EDIT_FILE} and no {LORA_FILE}; name the file")
    if not path.is_file():
        raise MissingFileError(f"there is no weight edit '{path}'; check the path")
    return path


def _write(file: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write beside the target and put it into place, so that no half file is left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.saving")
    # Cloned, because layers can share a factor and safetensors refuses shared memory.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(plain, fresh, metadata={"format": "pt", **header})
    fresh.replace(file)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a safetensors file; nothing else is ever opened."""
    try:
        with safe_open(file, framework="pt", device="cpu") as content:  # type: ignore[no-untyped-call]
            raw = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        header = json.loads(raw.get(HEADER, "{}"))
        if "lora_adapter_metadata" in raw:
            header["lora_adapter_metadata"] = json.loads(raw["lora_adapter_metadata"])
    except (SafetensorError, json.JSONDecodeError, OSError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"'{file}' is no intact safetensors file ({str(error).splitlines()[0]}); copy it "
            "again; pickled weights (.pt, .bin, .ckpt) are never opened"
        ) from error
    version = header.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"'{file}' has format version {version}, this mmforget reads {FORMAT_VERSION}; "
            "update mmforget, or write the file again"
        )
    if not tensors:
        raise WeightsError(f"'{file}' holds no tensors")
    return tensors, header


def _paired(
    file: Path,
    tensors: Mapping[str, Tensor],
    down_mark: str,
    up_mark: str,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors per layer, with ``alpha / rank`` inside `up`; every tensor must belong to a pair."""
    layers = sorted(n.removesuffix(down_mark) for n in tensors if n.endswith(down_mark))
    wanted = {f"{layer}{mark}" for layer in layers for mark in (down_mark, up_mark)}
    optional = {f"{layer}{ALPHA}" for layer in layers}
    odd = sorted((tensors.keys() ^ wanted) - (tensors.keys() & optional))
    if odd or not layers:
        name = odd[0] if odd else down_mark
        state = "unknown" if name in tensors else "missing"
        raise WeightsError(f"'{file}' is no LoRA: the tensor '{name}' is {state}")
    factors = {}
    for layer in layers:
        down, up = tensors[layer + down_mark], tensors[layer + up_mark]
        up = up.flatten(1)
        alpha = (alphas or {}).get(
            layer, float(tensors.get(layer + ALPHA, torch.tensor(len(down))))
        )
        factors[layer] = (up if alpha == len(down) else up * (alpha / len(down)), down)
    return factors


def _peft_config(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What peft must know so that every layer has the scale 1, also with different ranks."""
    ranks = {layer: up.shape[1] for layer, (up, _) in factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    # The caret keeps a name from matching the end of a longer one.
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }


def _alphas(config: Mapping[str, Any] | None, component: str) -> Mapping[str, float]:
    """Per layer the alpha that peft would use, from the configuration in a LoRA's header."""
    if not config or f"{component}.lora_alpha" not in config:
        return {}
    usual = config[f"{component}.lora_alpha"]
    pattern = config.get(f"{component}.alpha_pattern") or {}
    layers = config.get(f"{component}.target_modules") or []
    return {layer: pattern.get(f"^{layer}", pattern.get(layer, usual)) for layer in layers}


def _kohya_table(file: Path, model: Any) -> dict[str, str]:
    if model is None:
        raise WeightsError(
            f"'{file}' has the abbreviated layer names of kohya; pass `model`, whose names "
            "resolve them"
        )
    from mmforget.models.text_layers import family_of

    network = network_of(model, component_of(model))
    special = KOHYA_NAMES.get(family_of(network).name, {})
    table = {
        KOHYA + name.replace(".", "_"): name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return table | {KOHYA + short: name for name, short in special.items()}


def component_of(model: Any) -> str:
    """``unet`` or ``transformer``: which of them a pipeline has.

    Raises:
        WeightsError: neither.
    """
    pipe = getattr(model, "pipeline", model)
    for component in COMPONENTS:
        if getattr(pipe, component, None) is not None:
            return component
    raise WeightsError(f"{type(pipe).__name__} has neither a unet nor a transformer")


def network_of(model: Any, component: str) -> nn.Module:
    """The network that an edit belongs to.

    Args:
        model: a pipeline, a `DiffusionGenerator`, or the network itself.
        component: ``unet`` or ``transformer``.

    Raises:
        WeightsError: the pipeline has no such component.
    """
    pipe = getattr(model, "pipeline", model)
    found = getattr(pipe, component, None)
    if isinstance(found, nn.Module):
        return found
    if isinstance(pipe, nn.Module):
        return pipe
    raise WeightsError(
        f"the edit belongs to the {component}, which {type(pipe).__name__} does not have; it was "
        "made for another base"
    )


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def base_facts(model: Any, base_hash: str) -> dict[str, Any]:
    """Metadata on the model that an edit is computed from.

    Args:
        model: a `DiffusionGenerator`.
        base_hash: `state_hash` of its network before the edit.
    """
    import diffusers

    return {
        "base_model": model.source,
        "base_hash": base_hash,
        "pipeline": type(model.pipeline).__name__,
        "family": model.family.name,
        "denoiser": type(model.network).__name__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
    }
