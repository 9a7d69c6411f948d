"""Checkpoints as other people's code writes them, small, with weights set by a formula.

The shapes and names are written down here by hand. The tests compare with numbers that the
official code has drawn from the same weights.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

LOW_PASS = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that are easy to make anywhere: waves whose phase depends on the name."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(("resample_filter", "kernel")):
            weights[name] = LOW_PASS.clone() * (4 if name.endswith("kernel") else 1)
            continue
        count = torch.Size(shape).numel()
        if name.endswith("_filter"):  # of StyleGAN3
            taps = torch.tensor([1.0, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1]) / 42
            weights[name] = taps if len(shape) == 1 else torch.outer(taps, taps)
            continue
        waves = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + len(name)) * 1.4
        if "mapping.fc" in name or name.startswith("style."):
            waves = waves * (60 if name.endswith("weight") else 30)
        elif name.endswith(("conv_0.bias", "conv_1.bias", "conv_2.bias", "conv_3.bias")):
            waves = waves * 0.2
        elif name.endswith(("affine.bias", "running_vars", "magnitude_ema", "modulation.bias")):
            waves = 1.5 + 0.5 * waves
        elif name.endswith("transform"):
            waves = torch.eye(3, dtype=torch.float64).flatten() + 0.1 * waves
        weights[name] = waves.reshape(shape).float()
    return weights


@pytest.fixture
def fill() -> Callable[[Mapping[str, tuple[int, ...]]], dict[str, Tensor]]:
    return filled


@pytest.fixture
def stylegan2_shapes() -> Callable[..., Shapes]:
    """Names and shapes of NVIDIA's StyleGAN2."""

    def shapes(
        widths: dict[int, int], classes: int = 0, layers: int = 2, image: int = 3, size: int = 8
    ) -> Shapes:
        found: Shapes = {"mapping.w_avg": (size,), "synthesis.b4.const": (widths[4], 4, 4)}
        if classes:
            found |= {"mapping.embed.weight": (size, classes), "mapping.embed.bias": (size,)}
        for layer in range(layers):
            before = 2 * size if classes and layer == 0 else size
            found[f"mapping.fc{layer}.weight"] = (size, before)
            found[f"mapping.fc{layer}.bias"] = (size,)
        for side, width in widths.items():
            block = f"synthesis.b{side}"
            before = widths.get(side // 2, width)
            found[f"{block}.resample_filter"] = (4, 4)
            for which in ("conv1",) if side == 4 else ("conv0", "conv1"):
                inner = before if which == "conv0" else width
                found |= {
                    f"{block}.{which}.weight": (width, inner, 3, 3),
                    f"{block}.{which}.bias": (width,),
                    f"{block}.{which}.noise_strength": (),
                    f"{block}.{which}.noise_const": (side, side),
                    f"{block}.{which}.resample_filter": (4, 4),
                    f"{block}.{which}.affine.weight": (inner, size),
                    f"{block}.{which}.affine.bias": (inner,),
                }
            found |= {
                f"{block}.torgb.weight": (image, width, 1, 1),
                f"{block}.torgb.bias": (image,),
                f"{block}.torgb.affine.weight": (width, size),
                f"{block}.torgb.affine.bias": (width,),
            }
        return found

    return shapes


class PickleMaker:
    """Writes pickles as NVIDIA's code does, with modules that exist only while it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self, weights: Mapping[str, Any], arguments: Mapping[str, Any], key: str = "G_ema"
    ) -> Path:
        """A checkpoint with one network."""
        modules = {name: types.ModuleType(name) for name in (
            "torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}  # fmt: skip

        def _reconstruct_persistent_obj(meta: Any) -> Any:
            raise AssertionError("the code of the file was executed")

        _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
        _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
        modules["torch_utils.persistence"].__dict__["_reconstruct_persistent_obj"] = (
            _reconstruct_persistent_obj
        )
        easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
        modules["dnnlib.util"].__dict__["EasyDict"] = easy

        class Network:
            def __init__(self, about: Any) -> None:
                self.about = about

            def __reduce__(self) -> Any:
                return _reconstruct_persistent_obj, (self.about,)

        def network(prefix: str, given: Mapping[str, Any]) -> Network:
            own = {name: value for name, value in given.items() if "." not in name}
            parts: dict[str, dict[str, Any]] = {}
            for name, value in given.items():
                if "." in name:
                    first, _, rest = name.partition(".")
                    parts.setdefault(first, {})[rest] = value
            state = {
                "_parameters": {name: torch.nn.Parameter(value) for name, value in own.items()},
                "_buffers": {"nothing": None},
                "_modules": {name: network(name, part) for name, part in parts.items()},
                "_init_args": (),
                "_init_kwargs": easy(arguments) if not prefix else easy(),
            }
            return Network(
                easy(
                    type="class",
                    version=6,
                    module_src="raise SystemExit('the source in the file was executed')",
                    class_name="Generator",
                    state=state,
                )
            )

        content = {key: network("", weights), "D": None, "training_set_kwargs": easy(res=8)}
        stream = io.BytesIO()
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        try:
            pickle.dump(content, stream)
        finally:
            for name, module in before.items():
                del sys.modules[name]
                if module is not None:
                    sys.modules[name] = module
        path = self.folder / "network.pkl"
        path.write_bytes(stream.getvalue())
        return path


@pytest.fixture
def nvidia_pickle(tmp_path: Path) -> PickleMaker:
    return PickleMaker(tmp_path)


@pytest.fixture
def stylegan3_shapes() -> Callable[..., Shapes]:
    """Names and shapes of NVIDIA's StyleGAN3 for 16x16 pictures, with 4 layers."""

    def shapes(radial: bool) -> Shapes:
        found: Shapes = {
            "mapping.w_avg": (8,), "mapping.fc0.weight": (8, 8), "mapping.fc0.bias": (8,),
            "mapping.fc1.weight": (8, 8), "mapping.fc1.bias": (8,),
            "synthesis.input.weight": (6, 6), "synthesis.input.transform": (3, 3),
            "synthesis.input.freqs": (6, 2), "synthesis.input.phases": (6,),
            "synthesis.input.affine.weight": (4, 8), "synthesis.input.affine.bias": (4,),
        }  # fmt: skip
        kernel = 1 if radial else 3
        layers = ((36, 6, 6), (36, 6, 6), (36, 6, 4), (16, 4, 4), (16, 4, 3))
        for number, (side, before, after) in enumerate(layers):
            start = f"synthesis.L{number}_{side}_{after}"
            width = 1 if number == 4 else kernel
            found |= {
                f"{start}.weight": (after, before, width, width), f"{start}.bias": (after,),
                f"{start}.magnitude_ema": (), f"{start}.affine.weight": (before, 8),
                f"{start}.affine.bias": (before,),
            }  # fmt: skip
            if number < 4:
                found[f"{start}.up_filter"] = (12,)
                found[f"{start}.down_filter"] = (12, 12) if radial and number < 2 else (12,)
        return found

    return shapes


@pytest.fixture
def biggan_deep_shapes() -> Shapes:
    """Names and shapes of the published PyTorch weights of a BigGAN-deep of 16x16 pictures."""
    found: Shapes = {"embeddings.weight": (8, 5)}

    def normed(name: str, shape: tuple[int, ...], bias: bool = True) -> None:
        found[f"{name}.weight_orig"] = shape
        found[f"{name}.weight_u"] = shape[:1]
        found[f"{name}.weight_v"] = (torch.Size(shape[1:]).numel(),)
        if bias:
            found[f"{name}.bias"] = shape[:1]

    normed("generator.gen_z", (64 * 16, 16))
    blocks = {0: (64, 64), 1: (64, 32), 3: (32, 16), 4: (16, 8), 5: (8, 4)}
    for number, (before, after) in blocks.items():
        inner = before // 4
        convs = ((inner, before, 1), (inner, inner, 3), (inner, inner, 3), (after, inner, 1))
        for place, (rows, columns, width) in enumerate(convs):
            start = f"generator.layers.{number}"
            found[f"{start}.bn_{place}.running_means"] = (51, columns)
            found[f"{start}.bn_{place}.running_vars"] = (51, columns)
            normed(f"{start}.bn_{place}.scale", (columns, 16), bias=False)
            normed(f"{start}.bn_{place}.offset", (columns, 16), bias=False)
            normed(f"{start}.conv_{place}", (rows, columns, width, width))
    found["generator.layers.2.gamma"] = (1,)
    for name, (rows, columns) in {"theta": (4, 32), "phi": (4, 32), "g": (16, 32),
                                  "o_conv": (32, 16)}.items():  # fmt: skip
        normed(f"generator.layers.2.snconv1x1_{name}", (rows, columns, 1, 1), bias=False)
    for name in ("weight", "bias"):
        found[f"generator.bn.{name}"] = (4,)
    for name in ("running_means", "running_vars"):
        found[f"generator.bn.{name}"] = (51, 4)
    normed("generator.conv_to_rgb", (4, 4, 3, 3))
    return found


BIGGAN_DEEP = {
    "output_dim": 16, "z_dim": 8, "class_embed_dim": 8, "channel_width": 4, "num_classes": 5,
    "layers": [[False, 16, 16], [True, 16, 8], [False, 8, 4], [False, 4, 2], [True, 2, 1]],
    "attention_layer_position": 2, "eps": 1e-4, "n_stats": 51,
}  # fmt: skip


@pytest.fixture
def biggan_deep_folder(tmp_path: Path, biggan_deep_shapes: Shapes) -> Path:
    """A folder with config.json and pytorch_model.bin."""
    weights = with_norms(filled(biggan_deep_shapes))
    folder = tmp_path / "biggan"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(BIGGAN_DEEP))
    return folder


def with_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put vectors of the power iteration beside the weights, and a bit of liveliness into them."""
    for name in [name for name in weights if name.endswith("_orig")]:
        rows = weights[name].flatten(1)
        right = torch.ones(rows.shape[1]) / rows.shape[1] ** 0.5
        for _ in range(5):
            left = torch.nn.functional.normalize(rows @ right, dim=0)
            right = torch.nn.functional.normalize(left @ rows, dim=0)
        stem = name.removesuffix("orig")
        weights[stem + "u"], weights[stem + "v"] = left, right
    weights["generator.layers.2.gamma"] = torch.tensor([0.8])
    weights["generator.bn.bias"] *= 0.2  # the last layer is to stay away from the ends of tanh
    weights["generator.conv_to_rgb.bias"] *= 0.1
    return weights
