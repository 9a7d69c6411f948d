"""`mmforget forget`: run a method on one request or a sequence, save, audit, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.settings import checked_settings, requests_from

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from mmforget.cli.audit_section import ComparedModels
    from mmforget.cli.building import Trainers
    from mmforget.data.base import ForgetDataModule
    from mmforget.methods.base import ForgettingMethod
    from mmforget.models.base import Model
    from mmforget.request import ForgetRequest

HELP = """
usage: mmforget forget [-c FILE] [options]

Lets a model forget what a request names, or several requests one after the other. Leaves a run
folder with the weights, the results of the audit and the report, and adds to the ledger.

options, all of them also as keys of the YAML file:
  -c, --config FILE       YAML file; options after it change single values
  --model MODEL           a folder, a hub id, shipped:NAME, or a class such as ImageClassifier
  --method METHOD         class name (mmforget list methods); --method.OPTION for its options
  --data DATA             class name (mmforget list data); --data.OPTION for its options
  --request.classes LIST  what to forget, such as '[3]'; in YAML also a list of requests
  --request.samples LIST  ids of single training samples instead
  --trainer.OPTION VALUE  Lightning's trainer: max_epochs, devices, precision, ...
  --audit.OPTION VALUE    retrained, held_out, controls, enabled, and what the audit measures
  --run FOLDER            where the results go (default: runs/METHOD-REQUEST)
  --resume                go on where an interrupted run stopped
  --overwrite             replace an earlier run of this name
  --ledger FILE           the ledger (default: ledger.jsonl beside the run folder)
  --title TEXT            title of the report
  --print_config          print the complete configuration and stop
  --help-all              every option of every part, from the classes themselves

examples:
  mmforget forget -c configs/classifier/gs_lora_plus_plus.yaml
  mmforget forget -c configs/classifier/ssd.yaml --request.classes '[7]' --run runs/sevens
  mmforget forget --model shipped:digit_world/classifier_vit --method NegGradPlus \\
      --data DigitWorld --request.classes '[3]' --trainer.max_epochs 5
"""

KEYS = (
    "model",
    "method",
    "data",
    "request",
    "trainer",
    "audit",
    "run",
    "resume",
    "overwrite",
    "ledger",
    "title",
    "seed_everything",
)
FLAGS = ("resume", "overwrite")
REQUIRED = ("model", "method", "data", "request")


def run(args: list[str]) -> int:
    """Forget.

    Raises:
        MMForgetError: the settings are wrong, before anything is done.
    """
    settings = checked_settings("forget", args, KEYS, FLAGS, REQUIRED)
    return _run(args, settings)


def _run(args: list[str], settings: dict[str, Any]) -> int:
    from mmforget.audit.results import Results
    from mmforget.cli.building import settings_source
    from mmforget.cli.summary import table
    from mmforget.run import RunOptions, forget
    from mmforget.sequence import first_process

    plan = prepare(args, settings)
    config = plan.config
    name = config.method.class_path.rpartition(".")[2]
    folder = forget(
        model=plan.model,
        method=plan.method,
        data=plan.data,
        requests=plan.requests,
        trainer=plan.trainers,
        run=RunOptions(
            folder=Path(config.run or f"runs/{name}-{plan.requests[-1].name}"),
            resume=config.resume,
            overwrite=config.overwrite,
            ledger=Path(config.ledger) if config.ledger else None,
            title=config.title,
        ),
        audit_options=plan.audit.options(),
        config=plan.resolved,
        original_source=settings_source(settings, "model"),
    )
    if first_process():
        if plan.audit.enabled:
            results = Results.load(folder)
            print(f"\n{table(results)}\n\n{results.verdict.sentence}\n")
            print(f"report:  {folder / 'report.html'}")
        print(f"results: {folder}")
    return 0


@dataclass(frozen=True)
class Plan:
    """Everything that a forget run needs, built from its settings.

    Attributes:
        config: the parsed configuration; `resolved` is the same as YAML.
        method: makes the method for a model.
        trainers: makes Lightning trainers.
    """

    config: Namespace
    resolved: str
    model: Model
    method: Callable[[Model], ForgettingMethod]
    data: ForgetDataModule
    requests: list[ForgetRequest]
    trainers: Trainers
    audit: ComparedModels


def prepare(args: list[str], settings: dict[str, Any]) -> Plan:
    """Parse and build.

    Raises:
        MMForgetError: the settings are wrong.
        SystemExit: the user only wanted to see the options, which were printed.
    """
    from mmforget.cli import building
    from mmforget.cli.parsing import explained, find_class
    from mmforget.methods.base import ForgettingMethod

    parser, plain = forget_parser(settings)
    given = ["--help"] if "help-all" in settings else args
    config = explained(lambda: parser.parse_args(given), settings, plain)
    requests = requests_from(building.parsed_requests(config))
    built = explained(
        lambda: building.build(parser, config, "model", "method", "data", "audit"), settings, plain
    )
    method = find_class(config.method.class_path, ForgettingMethod)
    model = building.load_model(built.model)
    unused = method.find_unused_parameters or model.find_unused_parameters
    return Plan(
        config=config,
        resolved=parser.dump(config, skip_unset=False),
        model=model,
        method=built.method,
        data=built.data,
        requests=requests,
        trainers=building.Trainers(parser, config.trainer, unused),
        audit=built.audit,
    )


def forget_parser(settings: Mapping[str, Any]) -> tuple[Any, dict[str, type]]:
    """The full parser, and the sections that are one known class; the data decides the audit."""
    from lightning.pytorch import Trainer

    from mmforget.cli import building
    from mmforget.cli.audit_section import section_for

    parser = building.new_parser("forget")
    section = section_for(settings)
    building.add_model(parser)
    building.add_method(parser)
    building.add_data(parser)
    building.add_request(parser, required=True)
    building.add_trainer(
        parser, enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0
    )
    parser.add_argument("--audit", type=section, default=section())
    building.add_run(parser)
    return parser, {"trainer": Trainer, "audit": section}
