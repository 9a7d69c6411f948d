"""`mmforget export`: the weights of a run, also with one request withdrawn."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError, RunExistsError, WeightsError, suggest

HELP = """
usage: mmforget export RUN --to FOLDER [--without REQUEST]

Checks the files of a run against their hashes and writes its weights alone, in the format of
their own library. With `--without`, one request is taken back: the model then knows again what
that request erased, and the other requests stay in force. That works for methods that save an
adapter per request (GSLoRA, GSLoRAPlusPlus).

options:
  RUN                 a run folder, or the artifact folder in it
  --to FOLDER         where to write; must not exist
  --without REQUEST   name of the request, as the report shows it

examples:
  mmforget export runs/sevens --to weights
  mmforget export runs/sequence --to without-3 --without forget-3
  mmforget export runs/sequence/artifact --to weights
"""


def run(args: list[str]) -> int:
    """Export.

    Raises:
        RunExistsError: the folder exists.
        WeightsError: the files have changed since they were saved.
        ConfigurationError: there is no such request, or it has no adapter.
    """
    parser = Options("export")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--to", required=True, metavar="FOLDER")
    parser.add_argument("--without", metavar="REQUEST")
    given = parser.parse_args(args)
    target = Path(given.to)
    if target.exists():
        raise RunExistsError(f"`--to` is '{target}', which exists; choose another name")
    artifact = Path(given.run)
    if (artifact / "artifact").is_dir():
        artifact = artifact / "artifact"

    from mmforget.artifacts.manifest import Manifest
    from mmforget.artifacts.run_folder import put_in_place, writing

    problems = Manifest.read(artifact).verify(artifact)
    if problems:
        raise WeightsError(f"'{artifact}' is not as it was saved: {'; '.join(problems[:3])}")
    adapter = _adapter(artifact, given.without) if given.without else None

    from mmforget.artifacts.adapters import withdraw_adapter
    from mmforget.models.classifier import load_classifier

    model = load_classifier(artifact)
    if adapter:
        withdraw_adapter(model, adapter)
    work = target.with_name(f".{target.name}.saving")
    with writing(target):
        work.mkdir(parents=True)
        try:
            model.save_native(work)
            put_in_place(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    print(f"weights: {target}" + (f" (without {given.without})" if adapter else ""))
    return 0


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
