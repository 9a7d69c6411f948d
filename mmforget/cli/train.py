"""LightningCLI on a model: what `fit`, `validate`, `test` and `predict` have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from mmforget.audit.cost import measured
from mmforget.audit.families import check_fits
from mmforget.cli import building
from mmforget.cli.parsing import Parser, explained, import_known_classes
from mmforget.cli.settings import requests_from
from mmforget.data.base import ForgetDataModule
from mmforget.models.base import Model

PLAIN: dict[str, type] = {"trainer": Trainer}


class TrainCLI(LightningCLI):
    """LightningCLI whose model may also be a folder, a hub id or ``shipped:NAME``.

    It is not run by itself: `trainer`, `model` and `datamodule` are ready after construction, with
    the request made, and `resolved` is the complete configuration as YAML. Hyper-parameters stored
    in a checkpoint never replace the configuration.

    Args:
        command: name of the command.
        args: its arguments; `sys.argv` stays as it is, since the ``ddp`` launcher runs it again.
        settings: the arguments as `read_settings` read them.
        root: the trainer's root folder.
        trainer_defaults: further defaults of the trainer.
    """

    def __init__(
        self,
        command: str,
        args: list[str],
        settings: Mapping[str, Any],
        root: Path | None = None,
        trainer_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.command, self.settings, self.root = command, settings, root
        building.quiet_lightning()
        import_known_classes()
        super().__init__(
            Model,
            ForgetDataModule,
            save_config_callback=None,  # its file would hold the folder of the unfinished run
            trainer_defaults={**building.QUIET, **(trainer_defaults or {})},
            seed_everything_default=0,
            parser_kwargs={"prog": f"mmforget {command}"},
            parser_class=Parser,
            subclass_mode_data=True,
            args=["--help"] if "help-all" in settings else args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data."""
        assert isinstance(parser, Parser)
        defaults = {k: v for k, v in self.trainer_defaults.items() if k != "callbacks"}
        building.add_trainer(parser, **defaults)
        building.add_model(parser)
        building.add_data(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the request, the training data of `fit`, and where the results go."""
        assert isinstance(parser, Parser)
        building.add_request(parser, required=False)
        if self.command == "predict":
            parser.add_argument("--out", type=str | None, default=None)
        if self.command == "fit":
            parser.add_argument("--run", type=str | None, default=None)
            parser.add_argument("--overwrite", action="store_true")
            parser.add_argument("--resume", action="store_true")
            parser.add_argument("--view", type=Literal["full", "retain"] | None, default=None)
            parser.add_argument("--save", type=str | None, default=None)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with errors of one sentence."""
        assert isinstance(args, list)
        self.config = explained(lambda: parser.parse_args(args), self.settings, PLAIN)

    def before_instantiate_classes(self) -> None:
        """Check the request; send everything that is written into the run folder."""
        given = building.parsed_requests(self.config)
        self.requests = requests_from(given) if given else []
        self.resolved = str(self.parser.dump(self.config, skip_unset=False))
        if self.root is not None:
            self.config.trainer.default_root_dir = str(self.root)

    def instantiate_classes(self) -> None:
        """Instantiate, with errors of one sentence."""
        explained(super().instantiate_classes, self.settings, PLAIN)

    def after_instantiate_classes(self) -> None:
        """Load a model that was given by name, make the request, choose the training data."""
        self.model = building.load_model(self.model)
        check_fits(self.model, self.datamodule)
        if self.requests:
            self.datamodule.request(*self.requests)
        if self.config.get("view"):
            self.datamodule.view = self.config.view


class TrainingCost(Callback):
    """Counts the samples and seconds of a training, also over interruptions."""

    def __init__(self) -> None:
        self.samples, self.seconds, self._last = 0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add one step; padding is no sample."""
        self.samples += int(batch["weight"].sum())
        now = time.perf_counter()
        self.seconds, self._last = self.seconds + now - self._last, now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up all processes."""
        total = trainer.strategy.reduce(torch.tensor(self.samples), reduce_op="sum")
        self.samples = int(total)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on from."""
        return {"samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.samples, self.seconds = state_dict["samples"], state_dict["seconds"]

    def to_dict(self) -> dict[str, float]:
        """Cost as in `ModelEntry.cost`; a forward pass with backward counts as three."""
        return {"seconds": self.seconds, "sample_passes": 3.0 * self.samples}


def fit(cli: TrainCLI, checkpoint: Path) -> dict[str, Any]:
    """Train, from `checkpoint` if there is one.

    Returns:
        The cost of it, as in `ModelEntry.cost`.

    Raises:
        KeyboardInterrupt: it was interrupted, which Lightning turns into an exit.
    """
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    counted = next(c for c in callbacks if isinstance(c, TrainingCost))
    try:
        with measured() as cost:
            cli.trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=str(checkpoint) if checkpoint.is_file() else None,
                weights_only=True,
            )
        # a forked training process takes its counts with it when it ends
        return cost.to_dict() | (counted.to_dict() if counted.samples else {})
    except SystemExit:
        if cli.trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def evaluate(command: Literal["validate", "test"], args: list[str], settings: Any) -> int:
    """Run `Trainer.validate` or `Trainer.test`; Lightning prints the table."""
    cli = TrainCLI(command, args, settings)
    getattr(cli.trainer, command)(cli.model, datamodule=cli.datamodule)
    return 0
