"""Build classification networks of timm, torchvision, transformers and users; save them natively.

A saved folder is what the library itself would have written, so that the library loads it without
mmforget.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmforget.errors import MissingFileError, ModelError, WeightsError, suggest
from mmforget.models.weights import put_weights, read_weights, without_wrapper, write_weights

Library = Literal["timm", "torchvision", "transformers", "custom"]
LIBRARIES: tuple[Library, ...] = ("timm", "torchvision", "transformers", "custom")

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

Statistics = tuple[float, ...]


@dataclass(frozen=True)
class Architecture:
    """How a network is built, without its weights.

    Attributes:
        library: who builds it.
        name: name of a model (timm, torchvision), model type, hub id or folder (transformers),
            import path of a class (custom).
        num_classes: number of outputs; None takes the library's default.
        args: further arguments of the builder; fields of the configuration for transformers.
        factory: a function that builds a network, for networks without an importable name.
    """

    library: Library
    name: str = ""
    num_classes: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    factory: Callable[[], nn.Module] | None = None


def build(architecture: Architecture, pretrained: bool = False) -> nn.Module:
    """Build a network.

    Args:
        architecture: what to build.
        pretrained: take the library's weights (a download, unless cached); else draw new ones
            from the global random generator.

    Raises:
        ModelError: the name is unknown or the arguments do not fit.
    """
    if architecture.factory is not None:
        return build_from(architecture.factory)[0]
    builders = {
        "timm": _build_timm,
        "torchvision": _build_torchvision,
        "transformers": _build_transformers,
        "custom": _build_custom,
    }
    if architecture.library not in builders:
        raise ModelError(
            f"unknown `library` '{architecture.library}', {suggest(architecture.library, builders)}"
        )
    try:
        return builders[architecture.library](architecture, pretrained)
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        given = textwrap.shorten(str(architecture.args), 200) if architecture.args else "nothing"
        raise ModelError(
            f"{architecture.library} cannot build '{architecture.name}' with num_classes="
            f"{architecture.num_classes} and `network_args` {given}: {reason}; correct these"
        ) from error
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(
            f"the weights or configuration of '{architecture.name}' cannot be fetched "
            f"({str(error).strip().splitlines()[0]}); check the name and the connection, or give "
            "`weights`"
        ) from error


def build_from(factory: Callable[[], nn.Module]) -> tuple[nn.Module, Architecture]:
    """Build a network by a function, and say how to build it again.

    A class, or a class with keyword arguments bound by `functools.partial` (which is what a
    ``class_path`` in a YAML file becomes), is known by its import path from then on.

    Raises:
        ModelError: the function returns something else.
    """
    network = factory()
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"`network` returned a {type(network).__name__}; it must return a torch.nn.Module"
        )
    kind = type(network)
    args: dict[str, Any] | None = {} if factory is kind else None
    if isinstance(factory, functools.partial) and kind in (factory.func, *factory.args[-1:]):
        args = factory.keywords
    if args is None or "<locals>" in kind.__qualname__ or not _is_json(args):
        return network, Architecture("custom", factory=factory)
    return network, Architecture("custom", class_path(network), args=args)


def class_path(network: nn.Module) -> str:
    """Import path of the class of a network."""
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _with_classes(architecture: Architecture) -> dict[str, Any]:
    """Arguments of the builder, with the number of classes if it was given."""
    if architecture.num_classes is None:
        return architecture.args
    return {**architecture.args, "num_classes": architecture.num_classes}


def _build_timm(architecture: Architecture, pretrained: bool) -> nn.Module:
    import timm

    name = architecture.name
    bare = name.partition(".")[0]
    if ":" not in name and not timm.is_model(bare):
        raise ModelError(
            f"timm has no model '{name}', {suggest(bare, timm.list_models())}"
            " (all: `timm.list_models()`)"
        )
    if pretrained and ":" not in name and not timm.models.is_model_pretrained(name):
        raise ModelError(
            f"timm has no pretrained weights for '{name}'; leave `pretrained` out or give `weights`"
        )
    args = _with_classes(architecture)
    network = timm.create_model(name, pretrained=pretrained, **args)
    return cast(nn.Module, network)


def _build_torchvision(architecture: Architecture, pretrained: bool) -> nn.Module:
    from torchvision import models

    name = architecture.name
    # the submodules hold detection, segmentation and video models, which are no classifiers
    choices = models.list_models(module=models)
    if name not in choices:
        raise ModelError(f"torchvision has no classifier '{name}', {suggest(name, choices)}")
    network = models.get_model(name, weights=None, **_with_classes(architecture))
    if pretrained:
        given = models.get_model_weights(name).DEFAULT.get_state_dict(progress=True)
        own = network.state_dict()
        fitting = {key: v for key, v in given.items() if key in own and own[key].shape == v.shape}
        skipped = sorted(set(own) - set(fitting))
        if len({key.rpartition(".")[0] for key in skipped}) > 1:  # more than the last layer
            raise ModelError(
                f"the pretrained weights of '{name}' do not fit `network_args` "
                f"{architecture.args} (first difference: '{skipped[0]}'); leave these out"
            )
        network.load_state_dict(fitting, strict=False)
    return cast(nn.Module, network)


def _build_transformers(architecture: Architecture, pretrained: bool) -> nn.Module:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    args = dict(architecture.args)
    if architecture.num_classes is not None:
        args["num_labels"] = architecture.num_classes
    if pretrained:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            architecture.name, ignore_mismatched_sizes=architecture.num_classes is not None, **args
        )
        return cast(nn.Module, network)
    types = transformers.CONFIG_MAPPING
    if architecture.name in types:
        config = transformers.AutoConfig.for_model(architecture.name, **args)
    elif Path(architecture.name).is_dir() or "/" in architecture.name:
        config = transformers.AutoConfig.from_pretrained(architecture.name, **args)
    else:
        raise ModelError(
            f"transformers has no model type '{architecture.name}', "
            f"{suggest(architecture.name, types)}; a hub id has the form 'owner/name'"
        )
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no image classifier of type '{config.model_type}'; "
            "take for example 'vit', 'deit', 'swin' or 'convnext'"
        )
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    classes: list[Any] = list(found) if isinstance(found, list | tuple) else [found]
    wanted = config.architectures or []
    kind = next((c for c in classes if c.__name__ in wanted), classes[0])
    return cast(nn.Module, kind(config))


def _build_custom(architecture: Architecture, pretrained: bool) -> nn.Module:
    if pretrained:
        raise ModelError(
            f"`pretrained` has no meaning for the class '{architecture.name}'; give `weights`"
        )
    module, _, name = architecture.name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"`network` '{architecture.name}' cannot be imported ({error}); give the import path "
            "of a class, such as 'my_package.MyNet'"
        ) from error
    # anything else that a configuration file names is not called
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(
            f"`network` '{architecture.name}' is not the import path of a torch.nn.Module class; "
            "give one, such as 'my_package.MyNet'"
        )
    return kind(**architecture.args)


def redrawn(architecture: Architecture, network: nn.Module) -> nn.Module:
    """Build a network like a given one, with weights from the global random generator.

    Args:
        architecture: how `network` was built.
        network: the network whose final configuration counts (a pretrained transformers model
            brings more of it than its name says).
    """
    if architecture.library == "transformers":
        return cast(nn.Module, type(network)(copy.deepcopy(network.config)))  # type: ignore[arg-type]
    new = build(architecture)
    given = {parameter.data_ptr() for parameter in network.parameters()}
    if any(parameter.data_ptr() in given for parameter in new.parameters()):
        raise ModelError(
            "`network` returned the same weights twice; it must build a new network at each call"
        )
    return new


def recognise(network: nn.Module) -> Architecture | None:
    """How to build a network that was given as an object of timm or transformers.

    Returns:
        None if it is neither, or if it was changed so that building it anew gives other weights.
    """
    origin = type(network).__module__.partition(".")[0]
    if origin == "transformers" and hasattr(network, "config"):
        config: Any = network.config
        found = Architecture("transformers", config.model_type)
    elif origin == "timm":
        with tempfile.TemporaryDirectory() as folder:
            try:
                _write_timm_config(network, Saved(Architecture("timm"), None, None), Path(folder))
            except ValueError:  # timm: an argument of the network cannot be written as JSON
                return None
            found = read_description(Path(folder)).architecture
    else:
        return None
    with torch.random.fork_rng(devices=[]):
        again = redrawn(found, network).state_dict()
    own = network.state_dict()
    same = {name: value.shape for name, value in again.items()} == {
        name: value.shape for name, value in own.items()
    }
    return found if same else None


def default_statistics(
    architecture: Architecture, network: nn.Module, pretrained: bool
) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of the pixels, per channel, that a network was made for."""
    half = (0.5, 0.5, 0.5)
    if type(network).__module__.startswith("timm.") and hasattr(network, "pretrained_cfg"):
        config = network.pretrained_cfg
        return tuple(config["mean"]), tuple(config["std"])  # type: ignore[index, arg-type]
    if architecture.library == "torchvision" and pretrained:
        from torchvision import models

        transform = models.get_model_weights(architecture.name).DEFAULT.transforms()
        return tuple(transform.mean), tuple(transform.std)
    if architecture.library == "transformers" and pretrained:
        from transformers import BaseImageProcessor

        found, _ = BaseImageProcessor.get_image_processor_dict(architecture.name)
        if found.get("do_normalize", True) and "image_mean" in found:
            return tuple(found["image_mean"]), tuple(found["image_std"])
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return half, half


# ---- saving -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """What a native folder says about a model besides its weights.

    Attributes:
        architecture: how to build the network.
        mean, std: normalisation of the pixels, per channel.
        class_names: names of the outputs, empty if unknown.
        head: qualified name of the head, None if it can be found.
    """

    architecture: Architecture
    mean: Statistics | None
    std: Statistics | None
    class_names: tuple[str, ...] = ()
    head: str | None = None


def save(network: nn.Module, saved: Saved, folder: Path) -> None:
    """Write `network` as its library would.

    Args:
        network: the network; its weights may lie on any device.
        saved: its description, `mean` and `std` included.
        folder: an existing folder.
    """
    library = saved.architecture.library
    if library == "timm":
        _save_timm(network, saved, folder)
    elif library == "transformers":
        _save_transformers(network, saved, folder)
    else:
        _save_plain(network, saved, folder)


def _save_timm(network: nn.Module, saved: Saved, folder: Path) -> None:
    _write_timm_config(network, saved, folder)
    write_weights(network, folder / WEIGHTS_FILE)


def _write_timm_config(network: nn.Module, saved: Saved, folder: Path) -> None:
    from timm.models._hub import save_config_for_hf  # `timm.models` lacks it

    config: dict[str, Any] = {}
    if saved.mean and saved.std:
        config["pretrained_cfg"] = {"mean": saved.mean, "std": saved.std}
    if saved.class_names:
        config["label_names"] = list(saved.class_names)
    save_config_for_hf(
        network,
        str(folder / CONFIG_FILE),
        model_config=config,
        model_args=saved.architecture.args,
    )


def _save_transformers(network: Any, saved: Saved, folder: Path) -> None:
    if saved.class_names:
        network.config.id2label = dict(enumerate(saved.class_names))
        network.config.label2id = {name: i for i, name in enumerate(saved.class_names)}
    with without_bars():
        network.save_pretrained(folder)
    size = getattr(network.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    processor = {
        "image_processor_type": "ViTImageProcessor",  # resizes, scales to [0, 1] and normalises
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(saved.mean or ()),
        "image_std": list(saved.std or ()),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _save_plain(network: nn.Module, saved: Saved, folder: Path) -> None:
    """A state dict and a small JSON file, for torchvision and for user networks."""
    architecture = saved.architecture
    about: dict[str, Any]
    if architecture.library == "custom":
        about = {
            "library": "custom",
            "class_path": class_path(network),
            # None: nobody recorded the arguments, so loading needs the network itself
            "network_args": architecture.args if architecture.name else None,
            "head": saved.head,
        }
    else:
        about = {
            "library": architecture.library,
            "name": architecture.name,
            "network_args": architecture.args,
        }
    about |= {
        "num_classes": architecture.num_classes,
        "mean": list(saved.mean or ()),
        "std": list(saved.std or ()),
        "class_names": list(saved.class_names),
    }
    if not _is_json(architecture.args):
        raise ModelError(
            f"`network_args` {architecture.args} cannot be written as JSON; use plain values"
        )
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")
    write_weights(network, folder / WEIGHTS_FILE)


# ---- reading ----------------------------------------------------------------------------------


def read_description(folder: Path) -> Saved:
    """Read what a native folder says about its model.

    Raises:
        MissingFileError: the folder has no ``config.json``.
        WeightsError: it belongs to an adapter, or to no image classifier that we know.
    """
    if not (folder / CONFIG_FILE).is_file():
        if (folder / "adapter_config.json").is_file():
            raise WeightsError(
                f"'{folder}' holds an adapter, not a full model; load the base model and put the "
                "adapter on it"
            )
        raise MissingFileError(
            f"'{folder}' has no {CONFIG_FILE}; give a folder saved by timm, transformers or "
            "mmforget, or a weights file together with `network`"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise WeightsError(
            f"'{folder / CONFIG_FILE}' is damaged ({error}); copy it again"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"'{folder / CONFIG_FILE}' is no description of a model")
    try:
        if config.get("library") in ("torchvision", "custom"):
            return _described_plain(config)
        if "architecture" in config:
            return _described_timm(config)
        if "model_type" in config:
            return _described_transformers(folder, config)
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"'{folder / CONFIG_FILE}' lacks or misuses {error}; save the model again"
        ) from error
    raise WeightsError(
        f"'{folder / CONFIG_FILE}' names neither `architecture` (timm), `model_type` "
        "(transformers) nor `library`; give a weights file together with `network`"
    )


def _described_plain(config: dict[str, Any]) -> Saved:
    custom = config["library"] == "custom"
    args = config["network_args"]
    architecture = Architecture(
        library=config["library"],
        name=("" if args is None else config["class_path"]) if custom else config["name"],
        num_classes=config["num_classes"],
        args=args or {},
    )
    return Saved(
        architecture,
        tuple(config["mean"]),
        tuple(config["std"]),
        tuple(config.get("class_names", ())),
        config.get("head"),
    )


def _described_timm(config: dict[str, Any]) -> Saved:
    details = config.get("pretrained_cfg", config)  # old files have one level
    names = config.get("label_names") or ()
    args = dict(config.get("model_args") or {})
    number = config.get("num_classes", details.get("num_classes"))
    args.pop("num_classes", None)
    mean, std = details.get("mean"), details.get("std")
    return Saved(
        Architecture("timm", config["architecture"], number, args),
        tuple(mean) if mean else None,
        tuple(std) if std else None,
        tuple(names) if isinstance(names, list) else (),
    )


def _described_transformers(folder: Path, config: dict[str, Any]) -> Saved:
    names = {int(key): value for key, value in config.get("id2label", {}).items()}
    mean: Statistics | None = None
    std: Statistics | None = None
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        settings = json.loads(processor.read_text())
        if settings.get("do_normalize", True):
            mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    ordered = tuple(names[i] for i in sorted(names))
    if all(name == f"LABEL_{i}" for i, name in enumerate(ordered)):
        ordered = ()
    # self-contained, so that the model does not depend on the folder any more
    passing = ("model_type", "transformers_version", "dtype", "torch_dtype")
    args = {key: value for key, value in config.items() if key not in passing}
    number = len(names) or None
    return Saved(
        Architecture("transformers", config["model_type"], number, args), mean, std, ordered
    )


def load(network: nn.Module, path: str | Path, allow_pickle: bool = False) -> None:
    """Replace all weights of a network by those of a file; nothing changes if they do not fit.

    Args:
        network: the network, changed in place.
        path: a file in the format of the network's library.
        allow_pickle: execute the code in a pickle.

    Raises:
        MissingFileError: there is no such file.
        WeightsError: the file is damaged, does not fit, or would execute code.
    """
    weights = read_weights(path, allow_pickle)
    if type(network).__module__.startswith("transformers."):
        weights = _present_names(network, without_wrapper(weights, network))
    put_weights(network, weights, path)


def _present_names(network: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give weights of transformers the names of this version; its files keep those of the first."""
    with without_bars():
        loaded, report = type(network).from_pretrained(
            None,
            config=network.config,
            state_dict=dict(weights),
            ignore_mismatched_sizes=True,  # `put_weights` finds what does not fit
            output_loading_info=True,
        )
    named = {k: v for k, v in loaded.state_dict().items() if k not in report["missing_keys"]}
    named |= {key: weights[key] for key in report["unexpected_keys"] if key in weights}
    return named | {key: weights[key] for key, *_ in report["mismatched_keys"] if key in weights}


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for every file that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weights_file(folder: Path) -> Path:
    """The file with the weights of a native folder, safetensors first.

    Raises:
        MissingFileError: there is none.
        WeightsError: the weights are split over several files.
    """
    for name in (WEIGHTS_FILE, "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    if (folder / f"{WEIGHTS_FILE}.index.json").is_file():
        raise WeightsError(
            f"the weights in '{folder}' are split over several files; save them as one with "
            "`save_pretrained(folder, max_shard_size='100GB')`"
        )
    raise MissingFileError(f"'{folder}' has no {WEIGHTS_FILE}; check that the copy is complete")


def hub_folder(name: str, files: Sequence[str] = ("*.json", WEIGHTS_FILE)) -> Path:
    """Download the configuration and weights of a hub repository, or find them in the cache.

    Args:
        name: ``owner/name``.
        files: patterns of the files that are needed.

    Raises:
        MissingFileError: there is no such repository, or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingFileError(
            f"'{name}' is neither a file, a folder nor a reachable hub id "
            f"({str(error).splitlines()[0]}); check the name and the connection"
        ) from error


def to_device_of(network: nn.Module, reference: nn.Module) -> nn.Module:
    """Move a network to the device and floating-point type of another one."""
    like: torch.Tensor = next(reference.parameters())
    return network.to(device=like.device, dtype=like.dtype)


def plain(values: Sequence[float]) -> Statistics:
    """Numbers as a tuple of Python floats."""
    return tuple(float(value) for value in values)
