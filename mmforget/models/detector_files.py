"""Build, save and read detection networks in the formats of transformers and torchvision."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from mmforget.errors import MissingFileError, ModelError, WeightsError, suggest
from mmforget.models import native
from mmforget.models.detectors.base import DetectionNetwork
from mmforget.models.native import Architecture
from mmforget.models.weights import put_weights, read_weights, without_wrapper, write_weights

DetectorLibrary = Literal["transformers", "torchvision"]

QUERY_DETECTORS = {
    "detr": "DetrForObjectDetection",
    "conditional_detr": "ConditionalDetrForObjectDetection",
    "deformable_detr": "DeformableDetrForObjectDetection",
    "rt_detr": "RTDetrForObjectDetection",
}
PROCESSORS = {
    "detr": "DetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PROCESSOR_FILE = "preprocessor_config.json"
USUAL_EPS = 1e-5
"""What batch normalisation adds to the variance, unless the network says otherwise."""


def build(architecture: Architecture, pretrained: bool = False) -> nn.Module:
    """Build a detection network.

    Args:
        architecture: transformers: a model type such as ``rt_detr``, a hub id or a folder, with
            fields of the configuration as `args`; torchvision: the name of a builder such as
            ``fasterrcnn_mobilenet_v3_large_fpn`` with its arguments.
        pretrained: take the library's weights (a download, unless cached).

    Raises:
        ModelError: the name is unknown or the arguments do not fit.
        MissingFileError: the weights or the configuration cannot be fetched.
    """
    builders = {"transformers": _build_transformers, "torchvision": _build_torchvision}
    if architecture.library not in builders:
        raise ModelError(
            f"unknown `library` '{architecture.library}' of a detector, "
            f"{suggest(architecture.library, builders)}"
        )
    try:
        return builders[architecture.library](architecture, pretrained)
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{architecture.library} cannot build '{architecture.name}' with num_classes="
            f"{architecture.num_classes} and `network_args` {architecture.args}: {reason}; "
            "correct these"
        ) from error
    except OSError as error:
        raise MissingFileError(
            f"the weights or configuration of '{architecture.name}' cannot be fetched "
            f"({str(error).strip().splitlines()[0]}); check the name and the connection, or give "
            "`weights`"
        ) from error


def _build_transformers(architecture: Architecture, pretrained: bool) -> nn.Module:
    import transformers

    name, args = architecture.name, dict(architecture.args)
    if architecture.num_classes is not None:
        args["num_labels"] = architecture.num_classes
    if pretrained:
        network = transformers.AutoModelForObjectDetection.from_pretrained(
            name, ignore_mismatched_sizes=architecture.num_classes is not None, **args
        )
        return cast(nn.Module, network)
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name, **args)
    elif Path(name).is_dir() or "/" in name:
        config = transformers.AutoConfig.from_pretrained(name, **args)
    else:
        raise ModelError(
            f"transformers has no model type '{name}', {suggest(name, QUERY_DETECTORS)}; a hub id "
            "has the form 'owner/name'"
        )
    if config.model_type not in QUERY_DETECTORS:
        raise ModelError(
            f"'{config.model_type}' is not one of the detectors that mmforget knows from "
            f"transformers ({', '.join(QUERY_DETECTORS)}); take one of these, or one of torchvision"
        )
    return cast(nn.Module, getattr(transformers, QUERY_DETECTORS[config.model_type])(config))


def _build_torchvision(architecture: Architecture, pretrained: bool) -> nn.Module:
    from torchvision import models

    name = architecture.name
    choices = [
        found
        for found in models.list_models(module=models.detection)
        if found.startswith(("fasterrcnn", "retinanet", "fcos"))
    ]
    if name not in choices:
        raise ModelError(f"torchvision has no detector '{name}', {suggest(name, choices)}")
    _check_arguments(name, architecture.args)
    args: dict[str, Any] = {"weights": None, "weights_backbone": None, **architecture.args}
    if pretrained:
        args["weights"] = "DEFAULT"
    if architecture.num_classes is not None and not pretrained:
        # torchvision counts the background, except in FCOS, where class 0 is never asked for
        args["num_classes"] = architecture.num_classes + 1
    return cast(nn.Module, models.get_model(name, **args))


def _check_arguments(name: str, args: dict[str, Any]) -> None:
    """Refuse arguments that a builder of torchvision would swallow without a word."""
    from torchvision.models import detection, get_model_builder
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    kinds = {
        "fasterrcnn": detection.FasterRCNN,
        "retinanet": detection.RetinaNet,
        "fcos": detection.FCOS,
    }
    readers = [get_model_builder(name), kinds[name.partition("_")[0]], GeneralizedRCNNTransform]
    known = {key for reader in readers for key in inspect.signature(reader).parameters}
    for key in args:
        if key not in known - {"kwargs"}:
            raise ModelError(f"'{name}' has no argument '{key}', {suggest(key, sorted(known))}")


def wrapped(network: nn.Module, mean: Tensor, std: Tensor) -> DetectionNetwork:
    """Put a native network behind the common contract.

    Raises:
        ModelError: mmforget does not know this kind of network.
    """
    origin = type(network).__module__.partition(".")[0]
    if origin == "transformers" or hasattr(network, "config"):
        from mmforget.models.detectors.query_based import QueryDetector

        return QueryDetector(network, mean, std)
    from mmforget.models.detectors.torchvision_detectors import torchvision_detector

    return torchvision_detector(network)


def redrawn(architecture: Architecture | None, network: nn.Module) -> nn.Module:
    """Build a network like a given one, with weights from the global random generator.

    Raises:
        ModelError: the network was given as an object of torchvision, so nobody knows how it is
            built.
    """
    if hasattr(network, "config"):
        return cast(nn.Module, type(network)(copy.deepcopy(network.config)))  # type: ignore[arg-type]
    if architecture is None:
        raise ModelError(
            f"{type(network).__name__} was given as an object, so it cannot be built again; give "
            "`network` as the name of a builder"
        )
    args = {**architecture.args, "weights_backbone": None}
    return build(
        Architecture(architecture.library, architecture.name, architecture.num_classes, args)
    )


def default_statistics(network: nn.Module, source: str) -> tuple[native.Statistics, ...]:
    """Mean and standard deviation of the pixels that a network of transformers was made for.

    Those of ImageNet, unless the folder or the hub repository `source` says otherwise; networks of
    torchvision normalise by themselves.
    """
    if Path(source).is_dir() and (Path(source) / PROCESSOR_FILE).is_file():
        settings = json.loads((Path(source) / PROCESSOR_FILE).read_text())
        if not settings.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return tuple(settings["image_mean"]), tuple(settings["image_std"])
    if getattr(getattr(network, "config", None), "model_type", "") == "rt_detr":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # its image processor does not normalise
    return IMAGENET


def save(
    network: nn.Module,
    folder: Path,
    architecture: Architecture | None,
    mean: native.Statistics,
    std: native.Statistics,
    class_names: tuple[str, ...],
) -> None:
    """Write a network as its library would: ``save_pretrained``, or a state dict with its builder.

    Args:
        network: the native network.
        folder: an existing folder.
        architecture: how a network of torchvision is built; None if it was given as an object.
        mean: of the pixels, per channel.
        std: of the pixels, per channel.
        class_names: names of the classes, empty if unknown.
    """
    if hasattr(network, "config"):
        _save_transformers(network, folder, mean, std, class_names)
        return
    # whoever builds it again needs no downloads, since all weights are here
    nothing = {"weights": None, "weights_backbone": None}
    frozen = [m.eps for m in network.modules() if isinstance(m, FrozenBatchNorm2d)]
    about = {
        "library": "torchvision",
        "task": "detection",
        "name": architecture.name if architecture else None,
        "network_args": architecture.args | nothing if architecture else None,
        "num_classes": architecture.num_classes if architecture else None,
        "class_names": list(class_names),
        "frozen_batch_norm_eps": frozen[0] if frozen else None,
    }
    (folder / native.CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")
    write_weights(network, folder / native.WEIGHTS_FILE)


def _save_transformers(
    network: Any,
    folder: Path,
    mean: native.Statistics,
    std: native.Statistics,
    class_names: tuple[str, ...],
) -> None:
    import transformers

    if class_names:
        network.config.id2label = dict(enumerate(class_names))
        network.config.label2id = {name: i for i, name in enumerate(class_names)}
    network.config._name_or_path = ""  # where it once lay is nobody's business
    with native.without_bars():
        network.save_pretrained(folder)
    kind = getattr(transformers, PROCESSORS[network.config.model_type])
    # pictures come as they are: whoever wants another size says so
    processor = kind(do_resize=False, do_normalize=True, image_mean=list(mean), image_std=list(std))
    processor.save_pretrained(folder)


def is_detector(folder: Path) -> bool:
    """Whether a native folder holds a detector."""
    path = folder / native.CONFIG_FILE
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text())
    except ValueError:
        return False
    if not isinstance(config, dict):
        return False
    return config.get("task") == "detection" or config.get("model_type") in QUERY_DETECTORS


def read(folder: Path) -> tuple[Architecture, tuple[str, ...]]:
    """How the network of a native folder is built, and its class names.

    Raises:
        MissingFileError: the folder has no ``config.json``.
        WeightsError: it is damaged, or describes no detector that mmforget knows.
    """
    path = folder / native.CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(
            f"'{folder}' has no {native.CONFIG_FILE}; give a folder saved by transformers or "
            "mmforget, or `network` together with `weights`"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"'{path}' is damaged ({error}); copy it again") from error
    if not is_detector(folder):
        raise WeightsError(
            f"'{folder}' holds no detector that mmforget knows: {', '.join(QUERY_DETECTORS)} of "
            "transformers, or one of torchvision saved by mmforget"
        )
    if config.get("task") == "detection":
        if not config.get("name"):
            raise ModelError(
                f"'{folder}' holds a network that was given as an object, so it cannot be built "
                "again; give it as `network` with `weights`"
            )
        names = tuple(config["class_names"])
        found = Architecture(
            "torchvision", config["name"], config["num_classes"], config["network_args"]
        )
        return found, names
    labels = {int(key): value for key, value in config.get("id2label", {}).items()}
    names = tuple(labels[i] for i in sorted(labels))
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        names = ()
    return Architecture("transformers", str(folder)), names


def read_network(folder: Path, architecture: Architecture) -> nn.Module:
    """Build the network of a native folder with its weights, on the CPU, without any pickle.

    Raises:
        MissingFileError, WeightsError: see `mmforget.models.native.load`.
    """
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten at once
        network = build(architecture)
    eps = json.loads((folder / native.CONFIG_FILE).read_text()).get("frozen_batch_norm_eps")
    load(network, native.weights_file(folder), eps=USUAL_EPS if eps is None else eps)
    return network


def load(
    network: nn.Module, path: str | Path, allow_pickle: bool = False, eps: float = USUAL_EPS
) -> None:
    """Replace all weights of a network; see `mmforget.models.native.load`.

    torchvision freezes the batch normalisation of a trained backbone, but not that of an untrained
    one, so a network that is built for given weights is frozen where these have no counts.

    Args:
        network: the network, changed in place.
        path: a file in the format of the network's library.
        allow_pickle: execute the code in a pickle.
        eps: of frozen batch normalisation.

    Raises:
        MissingFileError, WeightsError: see `mmforget.models.native.load`.
    """
    if hasattr(network, "config"):
        native.load(network, path, allow_pickle)
        return
    weights = without_wrapper(read_weights(path, allow_pickle), network)
    expected = network.state_dict()
    for name, module in list(network.named_modules()):
        count = f"{name}.num_batches_tracked"
        if isinstance(module, nn.BatchNorm2d) and count in expected and count not in weights:
            parent, _, child = name.rpartition(".")
            frozen = FrozenBatchNorm2d(module.num_features, eps)
            setattr(network.get_submodule(parent), child, frozen)
    put_weights(network, weights, path)
