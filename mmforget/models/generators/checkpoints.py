"""Recognise checkpoints of published generators, and bring their weights under our names.

Nothing in a file is executed. Sizes are read from the shapes of the weights, because the same
configuration has other widths in other versions of the official code.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmforget.errors import MissingFileError, MMForgetError, ModelError, WeightsError
from mmforget.models.gan import ImageGAN
from mmforget.models.generators.pickled_networks import read_pickled_network, refused_by_torch
from mmforget.models.generators.style_layers import Mapping as StyleMapping
from mmforget.models.weights import read_weights
from mmforget.seeds import generator

LARGEST = 2 * 1024**3
"""Bytes of a file; published checkpoints stay below a fifth of it."""

USUAL_CLAMP = 256.0
"""Of maps in NVIDIA's training script. A state dict does not say it."""

DRAWS_FOR_MEAN = 4096
OTHER_FORMATS = {
    ".keras": "Keras", ".h5": "Keras", ".hdf5": "Keras", ".onnx": "ONNX", ".pb": "TensorFlow",
    ".tflite": "TensorFlow",
}  # fmt: skip
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of `torch.save` before torch 1.6 begin."""


@dataclass
class Checkpoint:
    """A generator of somebody else, ready for `ImageGAN`.

    Attributes:
        network: name in `mmforget.models.generators.NETWORKS`.
        network_args: arguments of its class.
        weights: all weights, under our names.
        settings: further arguments of `ImageGAN`.
        source: which code has written the file.
        names: our name of a weight: its name in the file.
        original: all tensors of the generator as they are in the file.
    """

    network: str
    network_args: dict[str, Any]
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    source: str
    names: dict[str, str] = field(repr=False)
    original: dict[str, Tensor] = field(repr=False)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of StyleGAN2, StyleGAN3 or BigGAN-deep.

    Known are pickles of NVIDIA's PyTorch code (``G_ema``), ``.pt`` files of rosinality's StyleGAN2
    (``g_ema``), BigGAN-deep as ``pytorch_model.bin`` with its ``config.json`` (the file or the
    folder), and state dicts, also as safetensors, with the names of these.

    Args:
        path: the file.

    Raises:
        MissingFileError: there is no such file, or BigGAN's configuration is missing.
        WeightsError: the file is damaged, would execute code, or has a format that is not read.
        ModelError: weights of a network that is not known, or of a variant that is not built.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "pytorch_model.bin"
    if not path.is_file():
        raise MissingFileError(f"there is no checkpoint '{path}'; check the path")
    other = OTHER_FORMATS.get(path.suffix.lower())
    if other:
        raise WeightsError(
            f"'{path}' is a file of {other}, which cannot be trained on here; give the weights of "
            "the PyTorch network as a state dict, together with `network`"
        )
    size = path.stat().st_size
    if size > LARGEST:
        raise WeightsError(
            f"'{path}' has {size / 1024**3:.1f} GiB, more than the {LARGEST // 1024**3} GiB that a "
            "generator can have; save the averaged generator alone"
        )
    if path.suffix == ".safetensors":
        return _recognised(path, read_weights(path), {})
    with path.open("rb") as file:
        head = file.read(len(LEGACY_TORCH))
    if head[:2] != b"PK" and head != LEGACY_TORCH:
        pickled = read_pickled_network(path)
        return _recognised(path, pickled.weights, {"arguments": pickled.arguments})
    return _from_torch(path)


def export_like(model: ImageGAN, original: str | Path, target: str | Path) -> Path:
    """Write the weights of a generator under the names that the original file uses.

    Code that has read a state dict of the original reads the new one in the same way.

    Args:
        model: made from `original` by `load_gan`, changed or not.
        original: the checkpoint.
        target: a ``.safetensors`` file, or a ``.pt`` file with a plain state dict; for
            rosinality's code this holds the state dict under ``g_ema``, as the original does.

    Returns:
        `target`.

    Raises:
        WeightsError: the model does not belong to the checkpoint.
        ModelError: a target with another ending.
        MissingFileError: there is no such original.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", ".pt"):
        raise ModelError(f"`target` is '{target}'; its name must end in .safetensors or .pt")
    found = read_checkpoint(original)
    own = model.network.state_dict()
    if set(own) != set(found.weights) or any(
        own[name].shape != value.shape for name, value in found.weights.items()
    ):
        raise WeightsError(
            f"the generator does not belong to '{original}': names or shapes of its weights "
            "differ; give the checkpoint that it was made from"
        )
    new = {name: value.contiguous().clone() for name, value in found.original.items()}
    for ours, theirs in found.names.items():
        value = own[ours].detach().cpu()
        new[theirs] = value.reshape(new[theirs].shape).to(new[theirs].dtype).contiguous()
        if theirs.endswith(".weight_orig"):
            # our weights are divided by their norm already, so theirs must come out as one
            stem = theirs.removesuffix("orig")
            rows = new[theirs].flatten(1)
            new[stem + "v"] = new[stem + "v"] / (new[stem + "u"] @ rows @ new[stem + "v"])
    if target.suffix == ".safetensors":
        save_file(new, target, metadata={"format": "pt"})
    elif found.source == ROSINALITY:
        torch.save({"g_ema": new, "latent_avg": own["mapping.mean"].detach().cpu()}, target)
    else:
        torch.save(new, target)
    return target


# ---- files of torch -----------------------------------------------------------------------------


def _from_torch(path: Path) -> Checkpoint:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
        if any("/code/" in name or name.endswith("constants.pkl") for name in inside):
            raise WeightsError(
                f"'{path}' is a TorchScript program, whose weights cannot be trained here; give "
                "the state dict of the network that it was made from, together with `network`"
            )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = refused_by_torch(error)
        what = f"asks for '{refused}'" if refused else "is damaged or asks for code"
        raise WeightsError(
            f"'{path}' {what}, which could execute code, so it was not loaded; save "
            "`network.state_dict()` instead of the whole object"
        ) from error
    except (RuntimeError, EOFError, ValueError, AttributeError, ImportError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"'{path}' cannot be read as weights ({reason}); copy or download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"'{path}' holds a {type(content).__name__} and not named tensors; save "
            "`network.state_dict()`"
        )
    if "GAN" in content and "version" in content:
        raise ModelError(
            f"'{path}' is a checkpoint of lucidrains' stylegan2-pytorch, whose network is not "
            "StyleGAN2 as published; give a function that builds it as `network`"
        )
    about: dict[str, Any] = {}
    if isinstance(content.get("latent_avg"), Tensor):
        about["mean"] = content["latent_avg"]
    for key in ("g_ema", "G_ema", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return _recognised(path, weights, about)


def _recognised(path: Path, given: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    weights = {name.removeprefix("module."): value for name, value in given.items()}
    for mark, convert in _MARKS.items():
        if mark in weights:
            try:
                return convert(path, weights, about)
            except MMForgetError:
                raise
            except KeyError as error:
                raise WeightsError(
                    f"'{path}' has no {error}, so it is not complete; use another checkpoint"
                ) from error
            except (IndexError, ValueError, RuntimeError) as error:
                raise WeightsError(
                    f"'{path}' has weights of unexpected shapes ({error}); use another checkpoint"
                ) from error
    first = f", the first is '{next(iter(weights))}'" if weights else ""
    raise ModelError(
        f"'{path}' holds {len(weights)} tensors of a network that is not known{first}; give "
        "`network`, the import path of its class or a function that builds it"
    )


def _renamed(
    weights: Mapping[str, Tensor], rules: Mapping[str, str], constants: str, path: Path
) -> dict[str, str]:
    r"""Our names of all weights, by patterns of theirs.

    Args:
        weights: theirs.
        rules: pattern of their name: our name, in which ``\1`` and so on are put in.
        constants: pattern of tensors that the network has without being told.
        path: for messages.
    """
    names: dict[str, str] = {}
    for theirs in weights:
        for pattern, ours in rules.items():
            match = re.fullmatch(pattern, theirs)
            if match:
                names[match.expand(ours)] = theirs
                break
        else:
            if not re.fullmatch(constants, theirs):
                raise ModelError(
                    f"'{path}' has '{theirs}', which is no weight of the network as published; "
                    "give a function that builds this variant as `network`"
                )
    return names


def _as_ours(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {ours: weights[theirs].detach().float() for ours, theirs in names.items()}


def _low_pass(filters: list[Tensor], path: Path) -> list[float]:
    """The filter of one dimension from those of two dimensions, which must be alike."""
    if not filters:
        raise KeyError("resample_filter")
    first = filters[0].float()
    taps = first.sum(dim=1) / first.sum()
    alike = all(
        kernel.shape == (4, 4)
        and torch.allclose(kernel.float() / kernel.sum(), torch.outer(taps, taps), atol=1e-6)
        for kernel in filters
    )
    if not alike or not torch.allclose(taps, taps.flip(0), atol=1e-6):
        raise ModelError(
            f"'{path}' doubles its pictures with unusual filters; give a function that builds "
            "this variant as `network`"
        )
    return [round(float(8 * tap), 6) for tap in taps]


def _settings(num_classes: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"prior": "normal", "value_range": "tanh"}
    return settings | ({"label_format": "one_hot"} if num_classes else {})


# ---- StyleGAN2 and 3 of NVIDIA ------------------------------------------------------------------

NVIDIA_MAPPING = {
    r"mapping\.w_avg": "mapping.mean",
    r"mapping\.embed\.(weight|bias)": r"mapping.embed.\1",
    r"mapping\.fc(\d+)\.(weight|bias)": r"mapping.layers.\1.\2",
}
HARMLESS = {
    "z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "channel_base", "channel_max",
    "num_fp16_res", "fp16_channels_last", "resample_filter", "w_avg_beta", "num_layers",
    "embed_features", "layer_features", "fused_modconv_default", "magnitude_ema_beta",
}  # fmt: skip
"""Arguments of official networks that shapes tell, or that do not change what is drawn."""


def _official(path: Path, about: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an official network that change what is drawn, with their defaults.

    Args:
        path: for messages.
        about: what the pickle says; a state dict says nothing.
        known: default per argument; a set holds the only values that are built.
    """
    given = dict(about.get("arguments", {}))
    for part in ("mapping_kwargs", "synthesis_kwargs"):
        given.update(given.pop(part, None) or {})
    for name, value in given.items():
        allowed = known.get(name, ()) if isinstance(known.get(name), set) else None
        if name not in HARMLESS and (name not in known or (allowed and value not in allowed)):
            raise ModelError(
                f"'{path}' was built with `{name}` {value!r}, which is not known here; give a "
                "function that builds this variant as `network`"
            )
    return {name: given.get(name, default) for name, default in known.items()}


def _mapping_args(weights: Mapping[str, Tensor], rate: float) -> dict[str, Any]:
    """Sizes of the mapping from the shapes of its weights."""
    layers = len([name for name in weights if re.fullmatch(r"mapping\.fc\d+\.weight", name)])
    first, last = weights["mapping.fc0.weight"], weights[f"mapping.fc{layers - 1}.weight"]
    embed = weights.get("mapping.embed.weight")
    embedded = 0 if embed is None else embed.shape[0]
    style_size = last.shape[0]
    args: dict[str, Any] = {
        "latent_size": first.shape[1] - embedded,
        "style_size": style_size,
        "num_classes": 0 if embed is None else embed.shape[1],
        "mapping_layers": layers,
        "mapping_rate": rate,
    }
    if embedded not in (0, style_size):
        args["label_size"] = embedded
    if layers > 1 and first.shape[0] != style_size:
        args["mapping_width"] = first.shape[0]
    return args


def _nvidia_stylegan2(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    official = _official(
        path,
        about,
        {
            "lr_multiplier": 0.01,
            "conv_clamp": None if "arguments" in about else USUAL_CLAMP,
            "architecture": {"skip"},
            "use_noise": {True},
            "activation": {"lrelu"},
        },
    )
    sides = sorted(
        int(name.split(".")[1][1:])
        for name in weights
        if re.fullmatch(r"synthesis\.b\d+\.conv1\.weight", name)
    )
    rules = dict(NVIDIA_MAPPING)
    rules[r"synthesis\.b4\.const"] = "const"
    parts = {"weight": "weight", "bias": "bias", "noise_strength": "noise_strength",
             "noise_const": "noise", r"affine\.weight": "style.weight",
             r"affine\.bias": "style.bias"}  # fmt: skip
    for number, side in enumerate(sides):
        for theirs, ours in parts.items():
            rules[rf"synthesis\.b{side}\.torgb\.{theirs}"] = f"to_image.{number}.{ours}"
            for which in (0, 1):
                place = which if number else 0
                rules[rf"synthesis\.b{side}\.conv{which}\.{theirs}"] = (
                    f"blocks.{number}.{place}.{ours}"
                )
    names = _renamed(weights, rules, r"synthesis\.b\d+\.(conv\d\.)?resample_filter", path)
    filters = [value for name, value in weights.items() if name.endswith("resample_filter")]
    args = _mapping_args(weights, official["lr_multiplier"]) | {
        "channels": [weights[f"synthesis.b{side}.conv1.weight"].shape[0] for side in sides],
        "image_channels": weights["synthesis.b4.torgb.weight"].shape[0],
        "clamp": official["conv_clamp"],
        "low_pass": _low_pass(filters, path),
    }
    return Checkpoint(
        "stylegan2", args, _as_ours(weights, names), _settings(args["num_classes"]),
        "NVIDIA StyleGAN2", names, weights,
    )  # fmt: skip


def _nvidia_stylegan3(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    if "arguments" not in about:
        raise ModelError(
            f"'{path}' holds a StyleGAN3 without the arguments that it was built with; give the "
            "pickle that the training has written, or `network` and `network_args`"
        )
    official = _official(
        path,
        about,
        {
            "lr_multiplier": 0.01,
            "conv_clamp": 256.0,
            "conv_kernel": 3,
            "use_radial_filters": False,
            "num_critical": 2,
            "first_cutoff": 2.0,
            "first_stopband": 2**2.1,
            "last_stopband_rel": 2**0.3,
            "margin_size": 10,
            "filter_size": 6,
            "lrelu_upsampling": {2},
            "output_scale": 0.25,
        },
    )
    stems = {
        int(found.group(1)): found.group(0).removesuffix(".weight")
        for found in (re.fullmatch(r"synthesis\.L(\d+)_\d+_\d+\.weight", name) for name in weights)
        if found
    }
    rules = dict(NVIDIA_MAPPING)
    rules[r"synthesis\.input\.(weight|freqs|phases|transform)"] = r"input.\1"
    rules[r"synthesis\.input\.affine\.(weight|bias)"] = r"input.style.\1"
    for number, stem in stems.items():
        start = re.escape(stem)
        rules[rf"{start}\.(weight|bias|up_filter|down_filter)"] = rf"layers.{number}.\1"
        rules[rf"{start}\.affine\.(weight|bias)"] = rf"layers.{number}.style.\1"
        rules[rf"{start}\.magnitude_ema"] = f"layers.{number}.magnitude"
    names = _renamed(weights, rules, r"", path)
    widths = [weights[f"{stems[number]}.weight"].shape[0] for number in range(len(stems))]
    args = _mapping_args(weights, official["lr_multiplier"]) | {
        "channels": widths[:-1],
        "image_channels": widths[-1],
        "resolution": int(about["arguments"]["img_resolution"]),
        "kernel_size": official["conv_kernel"],
        "radial": official["use_radial_filters"],
        "critical": official["num_critical"],
        "first_cutoff": official["first_cutoff"],
        "first_stopband": official["first_stopband"],
        "last_stopband": official["last_stopband_rel"],
        "margin": official["margin_size"],
        "filter_size": official["filter_size"],
        "output_scale": official["output_scale"],
        "clamp": official["conv_clamp"],
    }
    return Checkpoint(
        "stylegan3", args, _as_ours(weights, names), _settings(args["num_classes"]),
        "NVIDIA StyleGAN3", names, weights,
    )  # fmt: skip


# ---- StyleGAN2 of rosinality --------------------------------------------------------------------

ROSINALITY = "rosinality StyleGAN2"


def _rosinality_stylegan2(
    path: Path, weights: dict[str, Tensor], about: dict[str, Any]
) -> Checkpoint:
    count = 1 + len([name for name in weights if re.fullmatch(r"to_rgbs\.\d+\.bias", name)])
    rules = {r"input\.input": "const"}
    for layer in range(len([name for name in weights if re.fullmatch(r"style\.\d+\.bias", name)])):
        # the first of the list normalises the latent
        rules[rf"style\.{layer + 1}\.(weight|bias)"] = rf"mapping.layers.{layer}.\1"
    for number in range(count):
        image = f"to_rgbs\\.{number - 1}" if number else "to_rgb1"
        rules[rf"{image}\.bias"] = f"to_image.{number}.bias"
        rules[rf"{image}\.conv\.weight"] = f"to_image.{number}.weight"
        rules[rf"{image}\.conv\.modulation\.(weight|bias)"] = rf"to_image.{number}.style.\1"
        for place in range(2 if number else 1):
            layer = 2 * (number - 1) + place
            conv = f"convs\\.{layer}" if number else "conv1"
            ours = f"blocks.{number}.{place}"
            rules[rf"{conv}\.conv\.weight"] = f"{ours}.weight"
            rules[rf"{conv}\.conv\.modulation\.(weight|bias)"] = rf"{ours}.style.\1"
            rules[rf"{conv}\.noise\.weight"] = f"{ours}.noise_strength"
            rules[rf"{conv}\.activate\.bias"] = f"{ours}.bias"
            rules[rf"noises\.noise_{layer + 1 if number else 0}"] = f"{ours}.noise"
    names = _renamed(weights, rules, r"convs\.\d+\.conv\.blur\.kernel|to_rgbs\.\d+\..*kernel", path)
    channels = [weights["conv1.conv.weight"].shape[1]]
    channels += [weights[f"convs.{2 * n + 1}.conv.weight"].shape[1] for n in range(count - 1)]
    style_size, latent_size = weights["style.1.weight"].shape
    args = {
        "latent_size": latent_size,
        "style_size": style_size,
        "channels": channels,
        "image_channels": weights["to_rgb1.bias"].shape[1],
        "mapping_layers": len([name for name in names if re.fullmatch(r"mapping.*bias", name)]),
        "equalised": True,
        "low_pass": _low_pass(
            [value for name, value in weights.items() if name.endswith("kernel")], path
        ),
    }
    if weights["input.input"].shape[2:] != (4, 4):
        raise ModelError(
            f"'{path}' starts from a map of {tuple(weights['input.input'].shape[2:])}; only "
            "square pictures, from 4x4 on, are built"
        )
    ours_of = _as_ours(weights, names)
    for name, value in ours_of.items():
        if name == "const" or name.startswith(("blocks.", "to_image.")):
            ours_of[name] = _without_ones(name, value)
    ours_of["mapping.mean"] = (
        about["mean"].detach().float().flatten() if "mean" in about else _mean_style(ours_of, args)
    )
    return Checkpoint("stylegan2", args, ours_of, _settings(0), ROSINALITY, names, weights)


def _without_ones(name: str, value: Tensor) -> Tensor:
    """Drop the dimensions of size one that this code puts before its weights."""
    wanted = {"const": 3, "noise": 2, "noise_strength": 0, "bias": 1}
    last = name.rpartition(".")[2]
    ndim = 2 if ".style.weight" in name else wanted.get(last, 4)
    if last == "bias":
        return value.flatten()
    while value.ndim > ndim:
        value = value.squeeze(0)
    return value


@torch.no_grad()
def _mean_style(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> Tensor:
    """The mean over many styles, where a checkpoint does not hold it."""
    mapping = StyleMapping(args["latent_size"], args["style_size"], 0, args["mapping_layers"])
    own = {
        name.removeprefix("mapping."): value
        for name, value in weights.items()
        if name.startswith("mapping.")
    }
    mapping.load_state_dict(own | {"mean": mapping.mean})
    source = generator(0, "mean-style")
    styles: Tensor = mapping(torch.randn(DRAWS_FOR_MEAN, args["latent_size"], generator=source))
    return styles.mean(dim=0)


# ---- BigGAN-deep --------------------------------------------------------------------------------

BIGGAN = {
    r"embeddings\.weight": "embedding.weight",
    r"generator\.gen_z\.(weight|weight_orig|bias)": r"first.\1",
    r"generator\.layers\.(\d+)\.bn_(\d)\.(running_\w+)": r"layers.\1.norms.\2.\3",
    r"generator\.layers\.(\d+)\.bn_(\d)\.(scale|offset)\.(weight|weight_orig)":
        r"layers.\1.norms.\2.\3.\4",
    r"generator\.layers\.(\d+)\.conv_(\d)\.(weight|weight_orig|bias)": r"layers.\1.convs.\2.\3",
    r"generator\.layers\.(\d+)\.gamma": r"layers.\1.strength",
    r"generator\.layers\.(\d+)\.snconv1x1_theta\.(weight|weight_orig)": r"layers.\1.query.\2",
    r"generator\.layers\.(\d+)\.snconv1x1_phi\.(weight|weight_orig)": r"layers.\1.key.\2",
    r"generator\.layers\.(\d+)\.snconv1x1_g\.(weight|weight_orig)": r"layers.\1.value.\2",
    r"generator\.layers\.(\d+)\.snconv1x1_o_conv\.(weight|weight_orig)": r"layers.\1.out.\2",
    r"generator\.bn\.(weight|bias|running_\w+)": r"norm.\1",
    r"generator\.conv_to_rgb\.(weight|weight_orig|bias)": r"to_image.\1",
}  # fmt: skip


def _biggan_deep(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    configuration = path.parent / "config.json"
    if not configuration.is_file():
        raise MissingFileError(
            f"there is no config.json beside '{path}', which says how this BigGAN-deep is built; "
            "put it there"
        )
    try:
        about = json.loads(configuration.read_text(encoding="utf-8"))
        blocks = [[int(up), int(before), int(after)] for up, before, after in about["layers"]]
        attention, eps = int(about["attention_layer_position"]), float(about["eps"])
        width = int(about["channel_width"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{configuration}' does not describe a BigGAN-deep ({error!r}); use the one that was "
            "published with the weights"
        ) from error
    named = _renamed(weights, BIGGAN, r".*\.weight_[uv]", path)
    names = {ours.replace("weight_orig", "weight"): theirs for ours, theirs in named.items()}
    ours_of = _as_ours(weights, names)
    for ours, theirs in names.items():
        if theirs.endswith(".weight_orig"):
            stem = theirs.removesuffix("orig")
            rows = ours_of[ours].flatten(1)
            ours_of[ours] = ours_of[ours] / (weights[stem + "u"] @ rows @ weights[stem + "v"])
    embedding_size, num_classes = weights["embeddings.weight"].shape
    args = {
        "latent_size": ours_of["first.weight"].shape[1] - embedding_size,
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        "width": width,
        "blocks": blocks,
        "attention": attention,
        "num_statistics": len(ours_of["norm.running_means"]),
        "eps": eps,
    }
    settings = {
        "prior": "truncated_normal",
        "truncation": 2.0,
        "value_range": "tanh",
        "label_format": "one_hot",
    }
    return Checkpoint("biggan_deep", args, ours_of, settings, "BigGAN-deep", names, weights)


_MARKS: dict[str, Callable[[Path, dict[str, Tensor], dict[str, Any]], Checkpoint]] = {
    "synthesis.b4.const": _nvidia_stylegan2,
    "synthesis.input.freqs": _nvidia_stylegan3,
    "input.input": _rosinality_stylegan2,
    "embeddings.weight": _biggan_deep,
}
"""A tensor that only this kind of checkpoint has: who converts it."""
