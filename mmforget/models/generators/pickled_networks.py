"""Read pickled networks of NVIDIA's StyleGAN code without executing what is in the file.

Such a file holds the Python source of its networks, which its own reader executes. This reader
knows by name the few things that are data, stands in for everything else, and runs nothing.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import WeightsError

DEEPEST = 32
"""Modules inside each other."""

MOST_MODULES = 10_000
TENSORFLOW = ("dnnlib.tflib",)


@dataclass
class PickledNetwork:
    """What a pickled network says about itself.

    Attributes:
        class_name: of the network.
        arguments: that it was built with.
        weights: parameters and buffers by qualified name.
    """

    class_name: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)


class RefusedGlobal(pickle.UnpicklingError):
    """A name in a pickle that the reader does not look up."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def read_pickled_network(path: Path, key: str = "G_ema") -> PickledNetwork:
    """Read one network of a pickled dictionary.

    Args:
        path: the file.
        key: which network; ``G_ema`` is the average of the generator's weights.

    Raises:
        WeightsError: the file is damaged, would execute code, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = _Reader(file).load()
        if not isinstance(content, dict) or not isinstance(content.get(key), _Module):
            held = sorted(map(str, content)) if isinstance(content, dict) else type(content)
            raise WeightsError(
                f"'{path}' holds no pickled network '{key}' ({held}); give the checkpoint that "
                "the training has written, or a state dict of the averaged generator"
            )
        module = content[key]
        return PickledNetwork(
            str(module.about.get("class_name", "")), _arguments(module), _tensors(module)
        )
    except WeightsError:
        raise
    except RefusedGlobal as error:
        if error.name.startswith(TENSORFLOW):
            raise WeightsError(
                f"'{path}' is a checkpoint of the TensorFlow code ('{error.name}'); convert it "
                "with `legacy.py` of NVIDIA's stylegan3 repository, on a machine where executing "
                "it does no harm, and give the result"
            ) from error
        raise WeightsError(
            f"'{path}' asks for '{error.name}', which could execute code, so it was not loaded; "
            "save `network.state_dict()` of the averaged generator and give that"
        ) from error
    except Exception as error:  # a forged pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"'{path}' cannot be read as a pickled network ({reason}); copy or download it again"
        ) from error


def refused_by_torch(error: Exception) -> str | None:
    """The name that `torch.load` has refused to look up, if it says so."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found else None


class _Module:
    """A pickled module: its name and state, without its source."""

    def __init__(self, about: Any) -> None:
        if not isinstance(about, dict) or not isinstance(about.get("state"), dict):
            raise pickle.UnpicklingError("a pickled network without a state")
        self.about = {name: about[name] for name in ("class_name", "state") if name in about}

    @property
    def state(self) -> dict[str, Any]:
        """Attributes of the module."""
        state: dict[str, Any] = self.about["state"]
        return state


class _Reader(pickle._Unpickler):  # written in Python: its memo cannot be made to fill the memory
    """An unpickler that looks nothing up outside of its own table."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)

        # made per reader, because a pickle may set attributes on what it was given
        class Plain(dict[str, Any]):
            pass

        class Inert:
            """Stands for a value that is not needed, such as those of numpy."""

            def __init__(self, *given: Any) -> None: ...

            def __setstate__(self, state: Any) -> None: ...

        class Module(_Module):
            pass

        self.table: dict[str, Callable[..., Any]] = {
            "torch_utils.persistence._reconstruct_persistent_obj": lambda about: Module(about),
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "torch._utils._rebuild_tensor_v2": lambda *given: _tensor(*given),
            "torch.storage._load_from_bytes": lambda data: _storage(data),
            "torch.Size": lambda sizes=(): tuple(sizes),
            "torch.device": Inert,
            "collections.OrderedDict": OrderedDict,
            "builtins.set": lambda values=(): set(values),
            "dnnlib.util.EasyDict": Plain,
        }
        for name in ("dtype", "ndarray"):
            self.table[f"numpy.{name}"] = Inert
        for package in ("core", "_core"):
            for name in ("scalar", "_reconstruct"):
                self.table[f"numpy.{package}.multiarray.{name}"] = Inert

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for, or refuse it."""
        full = f"{module}.{name}"
        if full.startswith("__builtin__."):
            full = full.replace("__builtin__", "builtins", 1)
        if full not in self.table:
            raise RefusedGlobal(full)
        return self.table[full]


def _storage(data: Any) -> Any:
    """A storage from its own pickle inside the pickle, which is as restricted."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedGlobal(refused_by_torch(error) or "code inside of a tensor") from error


def _tensor(
    storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any
) -> Tensor:
    """A tensor in a storage; one that is larger than what was stored is refused."""
    numel = 1
    for length in size:
        numel *= length
    if numel * storage.dtype.itemsize > storage._untyped_storage.nbytes():
        raise pickle.UnpicklingError(f"a tensor of {tuple(size)} that is larger than its data")
    rebuilt: Tensor = torch._utils._rebuild_tensor_v2(  # type: ignore[no-untyped-call]
        storage, offset, tuple(size), tuple(stride), False, OrderedDict()
    )
    return rebuilt


def _arguments(module: _Module) -> dict[str, Any]:
    found = module.state.get("_init_kwargs", {})
    if module.state.get("_init_args"):
        raise WeightsError(
            "the pickled network was built with arguments without names; save its state dict and "
            "give that"
        )
    return dict(found)


def _tensors(module: _Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module and those inside, by qualified name."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any, int]] = [("", module, 0)]
    seen = 0
    while waiting:
        prefix, inner, depth = waiting.pop()
        seen += 1
        if not isinstance(inner, _Module) or depth > DEEPEST or seen > MOST_MODULES:
            raise pickle.UnpicklingError("modules that are not those of a generator")
        state = inner.state
        for kind in ("_parameters", "_buffers"):
            for name, value in state.get(kind, {}).items():
                if isinstance(value, Tensor):
                    found[f"{prefix}{name}"] = value.detach()
        for name, child in state.get("_modules", {}).items():
            if child is not None:
                waiting.append((f"{prefix}{name}.", child, depth + 1))
    return found
