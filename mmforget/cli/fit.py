"""`mmforget fit`: train the original model, or the retrained one that is the reference."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmforget.cli.settings import checked_settings, shows_options
from mmforget.errors import ConfigurationError, RunExistsError, suggest

HELP = """
usage: mmforget fit [-c FILE] [options]

Trains a model with Lightning: the original one on all data, or with `--view retain` and a request
the retrained one, which never sees the forget set and is the reference of an audit.

options, all of them also as keys of the YAML file:
  -c, --config FILE       YAML file; options after it change single values
  --model MODEL           a class such as ImageClassifier with --model.OPTION, or a trained model
  --data DATA             class name (mmforget list data); --data.OPTION for its options
  --view full|retain      train on everything, or on what the request leaves
  --request.classes LIST  what the retrained model must not see, such as '[3]'
  --trainer.OPTION VALUE  Lightning's trainer: max_epochs, devices, precision, ...
  --run FOLDER            where the results go (default: runs/fit)
  --save FOLDER           where the weights go, in their native format (default: RUN/weights)
  --resume                go on where an interrupted run stopped
  --overwrite             replace an earlier run of this name
  --print_config          print the complete configuration and stop
  --help-all              every option of every part, from the classes themselves

examples:
  mmforget fit -c configs/classifier/fit-digit_world.yaml
  mmforget fit -c configs/classifier/fit-digit_world.yaml --view retain --request.classes '[3]' \\
      --run runs/retrained-3
  mmforget fit --model ImageClassifier --model.network resnet18 --model.num_classes 10 \\
      --data DigitWorld --trainer.max_epochs 10
"""

KEYS = (
    "model",
    "data",
    "request",
    "trainer",
    "view",
    "run",
    "save",
    "resume",
    "overwrite",
    "seed_everything",
)
FLAGS = ("resume", "overwrite")


def run(args: list[str]) -> int:
    """Train.

    Raises:
        MMForgetError: the settings are wrong, before anything is done.
    """
    settings = checked_settings("fit", args, KEYS, FLAGS)
    view = settings.get("view") or "full"
    if view not in ("full", "retain"):
        raise ConfigurationError(f"`--view` is '{view}'; {suggest(view, ('full', 'retain'))}")
    if view == "retain" and settings.get("request") is None and not shows_options(settings):
        raise ConfigurationError(
            "`--view retain` needs to know what is left out; add `--request.classes`"
        )
    return _run(args, settings)


def _run(args: list[str], settings: dict[str, Any]) -> int:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from mmforget.artifacts.run_folder import RunFolder, atomic_write
    from mmforget.cli.train import TrainCLI, TrainingCost, fit
    from mmforget.sequence import first_process

    folder = RunFolder(
        str(settings.get("run") or "runs/fit"),
        overwrite=bool(settings.get("overwrite")),
        resume=bool(settings.get("resume")),
    )
    weights = Path(str(settings.get("save") or folder.work / "weights"))
    with ExitStack() as stack:
        if first_process() and not shows_options(settings):
            if settings.get("save") and weights.exists():
                raise RunExistsError(f"`--save` is '{weights}', which exists; choose another name")
            stack.enter_context(folder)
        checkpoints = ModelCheckpoint(folder.work / "checkpoints", save_last=True, save_top_k=0)
        cli = TrainCLI(
            "fit",
            args,
            settings,
            root=folder.work,
            trainer_defaults={"max_epochs": 10, "callbacks": [checkpoints, TrainingCost()]},
        )
        if first_process():
            atomic_write(folder.work / "config.yaml", cli.resolved)
        cost = fit(cli, folder.work / "checkpoints" / "last.ckpt")
        if first_process():
            weights.mkdir(parents=True)
            cli.model.save_native(weights)
            atomic_write(weights / "training.json", json.dumps({"cost": cost}, indent=1))
            path = folder.commit()
            shown = weights if settings.get("save") else path / "weights"
            print(f"weights: {shown}\nrun:     {path}")
    return 0
