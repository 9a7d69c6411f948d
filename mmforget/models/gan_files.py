"""Reading generators of GANs from folders, files and the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from mmforget.errors import MissingFileError, ModelError
from mmforget.models.gan import CONFIG_FILE, DISCRIMINATOR_FILE, WEIGHTS_FILE, ImageGAN
from mmforget.models.native import hub_folder
from mmforget.models.weights import put_weights, read_weights

SHIPPED = ("gan", "gan_conditional")
"""Folders of `mmforget/assets/digit_world` that `load_gan` knows by name."""


def load_gan(
    source: str | Path,
    network: str | Callable[[], nn.Module] | nn.Module | None = None,
    *,
    discriminator: bool = False,
    check: bool = True,
    **settings: Any,
) -> ImageGAN:
    """Load a trained generator, in evaluation mode.

    Args:
        source: a folder that `ImageGAN.save_native` or a run has written, ``gan`` or
            ``gan_conditional`` for those that are shipped, a hub id ``owner/name`` of such a
            folder, a file of weights for `network`, or a checkpoint of StyleGAN2, StyleGAN3 or
            BigGAN-deep as their authors publish them (read without executing what is in it).
        network: what the weights belong to; see `ImageGAN`. Needed for a file, and for the folder
            of a user's network whose arguments nobody recorded.
        discriminator: load the discriminator that lies beside the generator.
        check: draw some pictures and refuse a generator that cannot be right.
        settings: further settings of `ImageGAN`; they replace those of the folder.

    Raises:
        MissingFileError: there is no such file or folder, or it has no discriminator.
        WeightsError: weights that are damaged, do not fit, or would execute code.
        ModelError: the network is not known, or draws nothing sensible.
    """
    path = Path(source).expanduser()
    if str(source) in SHIPPED and not path.exists():
        path = Path(str(resources.files("mmforget") / "assets" / "digit_world" / str(source)))
    published = (path / "config.json").is_file() and not (path / CONFIG_FILE).is_file()
    if path.is_file() or published:
        model = _from_file(path, network, settings)
    else:
        model = _from_folder(_folder(path, source), network, settings, discriminator)
    model.eval()
    if check:
        model.check_drawing()
    return model


def _folder(path: Path, source: str | Path) -> Path:
    if not path.is_dir():
        if str(source).count("/") != 1 or path.suffix:
            raise MissingFileError(
                f"there is no generator '{source}'; give a file, a folder, {' or '.join(SHIPPED)}, "
                "or a hub id of the form 'owner/name'"
            )
        path = hub_folder(str(source), (CONFIG_FILE, WEIGHTS_FILE, DISCRIMINATOR_FILE))
    if (path / "artifact" / CONFIG_FILE).is_file():
        path = path / "artifact"  # a run folder
    if not (path / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"'{path}' has no {CONFIG_FILE}, so it is no generator of mmforget; give the file of "
            "its weights together with `network`"
        )
    return path


def _from_folder(
    path: Path,
    network: str | Callable[[], nn.Module] | nn.Module | None,
    settings: Mapping[str, Any],
    discriminator: bool,
) -> ImageGAN:
    about = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    if network is None and about.get("network_args") is None:
        raise ModelError(
            f"'{path}' holds a network that was given as an object, so it cannot be built again; "
            "give it as `network`"
        )
    kept = ("latent_size", "num_classes", "class_names", "prior", "truncation", "value_range",
            "label_format", "discriminator")  # fmt: skip
    given = {name: about[name] for name in kept if name in about} | dict(settings)
    if network is None:
        given.setdefault("network_args", about["network_args"])
    model = ImageGAN(
        about["class_path"] if network is None else network, weights=path / WEIGHTS_FILE, **given
    )
    if discriminator:
        if not (path / DISCRIMINATOR_FILE).is_file():
            raise MissingFileError(
                f"'{path}' has no {DISCRIMINATOR_FILE}; this needs the discriminator that the "
                "generator was trained against"
            )
        model.discriminator = model.new_discriminator()
        put_weights(
            model.discriminator, read_weights(path / DISCRIMINATOR_FILE), path / DISCRIMINATOR_FILE
        )
    return model


def _from_file(
    path: Path,
    network: str | Callable[[], nn.Module] | nn.Module | None,
    settings: Mapping[str, Any],
) -> ImageGAN:
    if network is not None:
        return ImageGAN(network, weights=path, **settings)
    from mmforget.models.generators.checkpoints import read_checkpoint

    found = read_checkpoint(path)
    given = {**found.settings, **settings}
    args = {**found.network_args, **given.pop("network_args", {})}
    model = ImageGAN(found.network, args, **given)
    put_weights(model.network, found.weights, path)
    return model
