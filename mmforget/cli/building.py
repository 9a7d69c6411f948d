"""From parsed settings to models and trainers; shared by the commands that run something."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import Trainer, seed_everything

from mmforget.cli.parsing import Parser, import_known_classes
from mmforget.data.base import ForgetDataModule
from mmforget.errors import MissingFileError, suggest
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Model
from mmforget.models.loading import load_trained
from mmforget.request import ForgetRequest

SHIPPED = "shipped:"
ASSETS = Path(__file__).parents[1] / "assets"

QUIET: dict[str, Any] = {"logger": False, "use_distributed_sampler": False}
"""Trainer defaults of all commands. Our samplers know about processes themselves, and Lightning's
default logger would write a folder of its own."""


def quiet_lightning() -> None:
    """Hide what Lightning says on every start; warnings and errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for said in (
        "does not have many workers",
        "have no `validation_step`",  # methods need none, the runner measures
        "`LightningModule.configure_optimizers` returned `None`",  # one pass, no steps
        "sync_dist=True",  # our metrics add up all processes themselves
        r"Found \d+ module\(s\) in eval mode",  # methods choose the modes themselves
    ):
        warnings.filterwarnings("ignore", message=f".*{said}.*")
    # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")


def new_parser(command: str) -> Parser:
    """A parser with the options of every command that builds a model."""
    quiet_lightning()
    import_known_classes()
    parser = Parser(prog=f"mmforget {command}", description=f"all options of mmforget {command}")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of this process")
    return parser


def add_model(parser: Parser) -> None:
    """Add ``model``: a class with its options, or the name of a trained model."""
    parser.add_argument(
        "--model",
        type=Model | str,
        required=True,
        help="class with options, folder, hub id, or shipped:NAME",
    )


def add_data(parser: Parser) -> None:
    """Add ``data``: a data module class with its options."""
    parser.add_subclass_arguments(ForgetDataModule, "data", required=True)


def add_request(parser: Parser, required: bool) -> None:
    """Add ``request``: one request or a list of them."""
    parser.add_argument(
        "--request",
        type=ForgetRequest | list[ForgetRequest],
        required=required,
        help="what to forget",
    )


def add_method(parser: Parser) -> None:
    """Add ``method``: a method class with its options except the model."""
    parser.add_argument("--method", type=Callable[[Model], ForgettingMethod], required=True)


def add_run(parser: Parser) -> None:
    """Add where the results go."""
    parser.add_argument("--run", type=str | None, default=None, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--ledger", type=str | None, default=None, help="file of the ledger")
    parser.add_argument("--title", type=str, default="", help="title of the report")


def add_trainer(parser: Parser, **defaults: Any) -> None:
    """Add ``trainer``: the options of Lightning's trainer."""
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in (QUIET | defaults).items()})


def parsed_requests(config: Namespace) -> list[dict[str, Any]]:
    """The request section of a parsed configuration as plain data."""
    given = config.request
    if given is None:
        return []
    items = given if isinstance(given, list) else [given]
    return [item.as_dict() if isinstance(item, Namespace) else dict(item) for item in items]


def build(parser: Parser, config: Namespace, *sections: str) -> Namespace:
    """Seed this process and instantiate some sections of a parsed configuration."""
    seed_everything(config.seed_everything, workers=True, verbose=False)
    return parser.instantiate(Namespace({name: config[name] for name in sections}))


def load_model(given: Model | str) -> Model:
    """Give back a built model, or load one by folder, hub id or ``shipped:NAME``.

    Raises:
        MissingFileError: there is no such model.
        WeightsError, ModelError: see `load_trained`.
    """
    return load_trained(model_folder(given)) if isinstance(given, str) else given


def model_folder(source: str) -> str:
    """Resolve ``shipped:NAME``; everything else stays as it is.

    Raises:
        MissingFileError: mmforget ships no such model.
    """
    if not source.startswith(SHIPPED):
        return source
    name = source.removeprefix(SHIPPED)
    folder = ASSETS / name
    if not (folder / "config.json").is_file():
        there = sorted(p.parent.relative_to(ASSETS).as_posix() for p in ASSETS.rglob("config.json"))
        raise MissingFileError(f"mmforget ships no model '{name}'; {suggest(name, there)}")
    return str(folder)


class Trainers:
    """Makes Lightning trainers from one configuration, each with callbacks of its own.

    Args:
        parser: the parser that read the configuration.
        section: the trainer section.
        find_unused_parameters: the model or method needs a search for unused parameters when it
            is trained in several processes and the strategy was left to Lightning.
    """

    def __init__(
        self, parser: Parser, section: Namespace, find_unused_parameters: bool = False
    ) -> None:
        self._parser, self._section = parser, section
        self._find_unused = find_unused_parameters

    def __call__(self, **overrides: Any) -> Trainer:
        """Return a new trainer; overrides replace settings, callbacks are added."""
        built = self._parser.instantiate(Namespace(trainer=self._section.clone())).trainer
        settings: dict[str, Any] = {**built.as_dict(), **overrides}
        settings["callbacks"] = [*_listed(built.callbacks), *_listed(overrides.get("callbacks"))]
        trainer = Trainer(**settings)
        if self._find_unused and trainer.world_size > 1 and settings["strategy"] == "auto":
            settings["strategy"] = "ddp_find_unused_parameters_true"
            trainer = Trainer(**settings)
        return trainer


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list) else [value]


def settings_source(settings: Mapping[str, Any], section: str) -> str:
    """What the user gave for a section, in one word: a class name, folder or id."""
    given = settings.get(section)
    return str(given.get("class_path", "")) if isinstance(given, Mapping) else str(given)
