"""`mmforget export`: the weights of a run, also with one request withdrawn; of GANs, any file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.pipelines import settings_of
from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError, RunExistsError, WeightsError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.models.base import Model

HELP = """
usage: mmforget export RUN --to FOLDER [--without REQUEST]

Checks the files of a run against their hashes and writes its weights alone, in the format of
their own library. With `--without`, one request is taken back: the model then knows again what
that request erased, and the other requests stay in force. That works for methods that save an
adapter per request (GSLoRA, GSLoRAPlusPlus).

A file of a GAN's weights (StyleGAN2, StyleGAN3, BigGAN-deep as their authors publish them, or any
weights together with `--network`) is read without executing what is in it, and converted into a
folder that every command on GANs takes.

options:
  RUN                 a run folder, the artifact folder in it, or a file of a GAN's weights
  --to FOLDER         where to write; must not exist
  --without REQUEST   name of the request, as the report shows it
  --network CLASS     what a file of weights belongs to, such as module.Class
  --load NAME=VALUE   how a file of weights is read, such as prior=uniform

examples:
  mmforget export runs/sevens --to weights
  mmforget export runs/sequence --to without-3 --without forget-3
  mmforget export runs/sequence/artifact --to weights
  mmforget export ffhq.pkl --to ffhq
"""


def run(args: list[str]) -> int:
    """Export.

    Raises:
        RunExistsError: the folder exists.
        WeightsError: the files have changed since they were saved, or would execute code.
        ConfigurationError: there is no such request, or it has no adapter.
        ModelError: the network of a file is not known.
    """
    parser = Options("export")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--to", required=True, metavar="FOLDER")
    parser.add_argument("--without", metavar="REQUEST")
    parser.add_argument("--network", metavar="CLASS")
    parser.add_argument("--load", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args(args)
    target = Path(given.to)
    if target.exists():
        raise RunExistsError(f"`--to` is '{target}', which exists; choose another name")
    artifact = Path(given.run)
    if artifact.is_file():
        return _convert(artifact, given, target)
    for name in ("network", "load"):
        if getattr(given, name):
            raise ConfigurationError(
                f"`--{name}` is for a file of weights, but '{artifact}' is none; leave it out"
            )
    if (artifact / "artifact").is_dir():
        artifact = artifact / "artifact"

    from mmforget.artifacts.manifest import Manifest

    problems = Manifest.read(artifact).verify(artifact)
    if problems:
        raise WeightsError(f"'{artifact}' is not as it was saved: {'; '.join(problems[:3])}")
    adapter = _adapter(artifact, given.without) if given.without else None

    from mmforget.artifacts.adapters import withdraw_adapter
    from mmforget.models.gan import CONFIG_FILE
    from mmforget.models.gan_files import load_gan
    from mmforget.models.loading import load_trained

    model: Any = (
        load_gan(artifact) if (artifact / CONFIG_FILE).is_file() else load_trained(artifact)
    )
    if adapter:
        withdraw_adapter(model, adapter)
    _save(model, target)
    print(f"weights: {target}" + (f" (without {given.without})" if adapter else ""))
    return 0


def _convert(source: Path, given: Namespace, target: Path) -> int:
    """Turn a file of a GAN's weights into a folder."""
    if given.without:
        raise ConfigurationError(
            f"`--without` takes a request back from a run, but '{source}' is a file of weights; "
            "leave it out"
        )
    from mmforget.models.gan_files import load_gan

    model = load_gan(source, given.network, **settings_of(given.load, "--load"))
    _save(model, target)
    print(f"generator: {target}")
    return 0


def _save(model: Model, target: Path) -> None:
    from mmforget.artifacts.run_folder import put_in_place, writing

    work = target.with_name(f".{target.name}.saving")
    with writing(target):
        work.mkdir(parents=True)
        try:
            model.save_native(work)
            put_in_place(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _adapter(artifact: Path, request: str) -> Path:
    from mmforget.artifacts.save import folder_name

    found = sorted(path.name for path in (artifact / "adapters").glob("*"))
    if not found:
        raise ConfigurationError(
            f"'{artifact}' has no adapters, so no request can be withdrawn from it"
        )
    if folder_name(request) not in found:
        raise ConfigurationError(f"there is no request '{request}'; {suggest(request, found)}")
    return artifact / "adapters" / folder_name(request)
