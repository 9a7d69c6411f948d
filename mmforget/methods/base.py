"""The frame of every forgetting method: a Lightning module that receives the model it edits."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.data.base import ForgetDataModule, View
from mmforget.errors import ConfigurationError, DivergenceError, suggest
from mmforget.models.base import Batch, Model, check_capabilities, state_hash
from mmforget.seeds import derive

logger = logging.getLogger(__name__)

COPY_LIMIT_BYTES = 2**30


class ForgettingMethod(LightningModule):
    """Base of all methods, also of those that need no training.

    ::

        method = GSLoRA(model, rank=8)                 # attaches, freezes, prepares what it needs
        Trainer(max_epochs=20).fit(method, datamodule)  # forget
        unlearned = method.finalize()                  # an ordinary model again, in eval mode

    Class attributes:
        requires: capabilities of the model (see `mmforget.models.base`).
        access: the data that the method reads; the data module refuses everything else.
        view: the training data it iterates over; None for an edit without training.
        control: a method that must fail the audit.
        expects_change: False for the one control that leaves the model as it is.
        find_unused_parameters: whether `DistributedDataParallel` must look for unused parameters.
        saves_adapter: whether `save_adapter` can write the change of this request by itself.
        edits_weights: False for a method whose result has the weights of the original and
            something else besides, such as other guidance.

    Args:
        model: the trained model. It is left as it is until `finalize` if a copy is taken.
        copy: True edits a deep copy, False edits the model itself, ``auto`` copies up to 1 GiB.
        seed: base of every random draw of the method.

    Raises:
        CapabilityError: the model lacks something that the method `requires`.
    """

    requires: ClassVar[tuple[type, ...]] = ()
    access: ClassVar[DataAccess] = DataAccess()
    view: ClassVar[View | None] = "paired"
    control: ClassVar[bool] = False
    expects_change: ClassVar[bool] = True
    find_unused_parameters: ClassVar[bool] = False
    saves_adapter: ClassVar[bool] = False
    edits_weights: ClassVar[bool] = True

    model: Any  # a Model that offers what the method `requires`, which no static type can say
    sample_passes: Tensor

    def __init__(self, model: Model, copy: bool | Literal["auto"] = "auto", seed: int = 0) -> None:
        super().__init__()
        check_capabilities(type(self).__name__, model, self.requires)
        if copy == "auto":
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            copy = size <= COPY_LIMIT_BYTES
        self.copied = copy
        self._given = (model,)  # in a tuple, so that it is not registered as a submodule
        self.model = detached_copy(model) if copy else model
        self.seed = seed
        self.no_op = False
        self._data: ForgetDataModule | None = None
        self._start_hash = state_hash(model)
        self._required_grad = {n: p.requires_grad for n, p in self.model.named_parameters()}
        # rows: forget, retain; columns: forward only, forward and backward. A buffer, because
        # plain attributes are lost when a forked or spawned training process ends.
        self.register_buffer("sample_passes", torch.zeros(2, 2, dtype=torch.float64))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The method's own buffers, for `DistributedDataParallel`.

        It would overwrite every process's buffers by those of the first before each forward pass,
        and with them the sums and counts that a process has collected itself.
        """
        return [name for name, _ in self.named_buffers() if not name.startswith("model.")]

    # ---- data -------------------------------------------------------------------------------

    def bind(self, data: ForgetDataModule) -> None:
        """Connect the data, with the access that the method declared and no more."""
        self._data = data.restricted(self.access)

    @property
    def data(self) -> ForgetDataModule:
        """The data module, restricted to the declared access.

        Raises:
            ConfigurationError: the method has not been given any data yet.
        """
        if self._data is None:
            raise ConfigurationError(
                f"{type(self).__name__} has no data yet; call `Trainer.fit(method, datamodule)` "
                "or `method.bind(datamodule)` first"
            )
        return self._data

    def setup(self, stage: str) -> None:
        """Take the data module from the trainer and check that it serves the right view."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ForgetDataModule):
            raise ConfigurationError(
                f"{type(self).__name__} needs a ForgetDataModule; call "
                "`Trainer.fit(method, datamodule=...)` instead of passing loaders"
            )
        if self.view is not None and data.view != self.view:
            raise ConfigurationError(
                f"{type(self).__name__} trains on the view '{self.view}', but the data module "
                f"serves '{data.view}'; set `datamodule.view = method.view` before `fit`"
            )
        self.bind(data)
        data.access = self.access

    def teardown(self, stage: str) -> None:
        """Lift the restriction: what comes after training, such as the audit, reads everything."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ForgetDataModule):
            data.access = None

    # ---- state that travels along a sequence of requests ---------------------------------------

    def carry(self) -> dict[str, Tensor]:
        """State that the method of the next request needs, beyond the weights."""
        return {}

    def inherit(self, state: dict[str, Tensor]) -> None:
        """Take over what the method of the previous request returned from `carry`."""

    # ---- cost -----------------------------------------------------------------------------------

    def spend(self, forget: int = 0, retain: int = 0, backward: bool = False) -> None:
        """Count samples that went through the model once."""
        column = int(backward)
        self.sample_passes[0, column] += forget
        self.sample_passes[1, column] += retain

    def cost(self) -> dict[str, float]:
        """Sample passes so far, in forward equivalents: a forward is 1, with backward 3."""
        passes = self.sample_passes.cpu()
        weighted = passes[:, 0] + 3 * passes[:, 1]
        return {
            "sample_passes": float(weighted.sum()),
            "forget_sample_passes": float(weighted[0]),
            "retain_sample_passes": float(weighted[1]),
        }

    def statistics(self) -> dict[str, Any]:
        """Method-specific facts for the report, plain data."""
        return {}

    # ---- the end ------------------------------------------------------------------------------

    def edit(self) -> None:
        """Bring the result into the weights of `self.model`. Runs once, inside `finalize`."""

    @torch.no_grad()
    def finalize(self) -> Model:
        """Merge, detach and return the unlearned model, in eval mode.

        Raises:
            DivergenceError: a parameter of the result is not finite.
        """
        self.edit()
        model: Model = self.model
        model.trainer = None
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
            if not torch.isfinite(parameter).all():
                raise DivergenceError(
                    f"{type(self).__name__} ended with non-finite values in '{name}'; "
                    "lower the learning rate"
                )
        self.no_op = self.edits_weights and state_hash(model) == self._start_hash
        if self.no_op and self.expects_change:
            logger.warning(
                "%s changed no parameter: the result is the original model", type(self).__name__
            )
        return model.eval()

    def save_adapter(self, folder: Path) -> None:
        """Write the change of this request by itself, after `finalize`.

        Raises:
            ConfigurationError: the method has no adapter.
        """
        raise ConfigurationError(f"{type(self).__name__} has no adapter; save the whole model")

    def restore(self) -> Model:
        """Give back the model that the method received, bit by bit as it was.

        Raises:
            ConfigurationError: the model was edited in place and the method cannot undo it.
        """
        if self.copied:
            return self._given[0]
        raise ConfigurationError(
            f"{type(self).__name__} trained all weights in place; construct it with copy=True "
            "to keep the given model"
        )


OptimizerName = Literal["adamw", "adam", "sgd"]


class GradientMethod(ForgettingMethod):
    """Base of the methods that minimise a loss over forget and retain batches.

    Subclasses implement `losses`. Weights of padded samples are respected by `global_mean`, whose
    gradient, after the averaging of `DistributedDataParallel`, is the gradient of the mean over the
    global batch: several processes give the result of one.

    Args:
        model, copy, seed: see `ForgettingMethod`.
        lr: learning rate at the start.
        lr_min: learning rate at the end of the cosine schedule, which steps once per epoch.
        weight_decay: decoupled for ``adamw``, L2 for the others.
        optimizer: ``adamw``, ``adam`` or ``sgd`` (momentum 0.9).
        freeze_bn: keep BatchNorm layers in eval mode, so that no statistics of the forget set
            enter their buffers.
    """

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-3,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        freeze_bn: bool = True,
    ) -> None:
        super().__init__(model, copy=copy, seed=seed)
        self.check_training(lr, optimizer)
        self.lr, self.lr_min, self.weight_decay = lr, lr_min, weight_decay
        self.optimizer_name = optimizer
        self.freeze_bn = freeze_bn

    @staticmethod
    def check_training(lr: float, optimizer: str) -> None:
        """Refuse settings of the optimizer that have no meaning.

        Raises:
            ConfigurationError: names the setting and its value.
        """
        if optimizer not in ("adamw", "adam", "sgd"):
            raise ConfigurationError(
                f"`optimizer` is '{optimizer}', {suggest(optimizer, ('adamw', 'adam', 'sgd'))}"
            )
        if not lr > 0:
            raise ConfigurationError(f"`lr` is {lr}, it must be positive")

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the weighted loss terms of one step; their sum is minimised.

        Args:
            batch: ``{"forget": Batch, "retain": Batch}`` for the view ``paired``, else one batch.
        """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum the terms, refuse a loss that is not finite, log, count the cost."""
        terms = self.losses(batch)
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            shown = ", ".join(f"{name} = {value.item():g}" for name, value in terms.items())
            saved = [getattr(c, "last_model_path", "") for c in self.trainer.callbacks]  # type: ignore[attr-defined]
            checkpoint = next((path for path in saved if path), "none")
            raise DivergenceError(
                f"{type(self).__name__}: the loss is not finite at step {self.global_step} "
                f"({shown}); lower `lr` (now {self.lr:g}); last good checkpoint: "
                f"{checkpoint}"
            )
        self.log_dict({f"loss/{name}": value.detach() for name, value in terms.items()})
        self.log("loss/total", total.detach(), prog_bar=True)
        self.count(batch)
        return total

    def count(self, batch: Any) -> None:
        """Count the cost of a step: by default one forward and backward over the whole batch."""
        if self.view == "paired":
            self.spend(samples(batch["forget"]), samples(batch["retain"]), backward=True)
        elif self.view == "forget":
            self.spend(forget=samples(batch), backward=True)
        else:
            self.spend(retain=samples(batch), backward=True)

    def on_train_epoch_start(self) -> None:
        """Set modes, and key the global generator by epoch, so that resuming draws the same."""
        self.model.train()
        if self.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        torch.manual_seed(derive(self.seed, "train", self.current_epoch, self.global_rank))

    def on_train_end(self) -> None:
        """Add up the cost of all processes."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.sample_passes)

    def configure_optimizers(self) -> Any:
        """The chosen optimizer over all parameters that are not frozen, with cosine schedule."""
        groups = self.parameter_groups()
        if self.optimizer_name == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        elif self.optimizer_name == "adam":
            optimizer = torch.optim.Adam(groups, lr=self.lr)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        epochs = max(1, self.trainer.max_epochs or 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, self.lr_min)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimizer; override to exempt some from weight decay."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": self.weight_decay}]

    def global_mean(self, values: Tensor, weight: Tensor) -> Tensor:
        """Mean of per-sample values over the batch of all processes, scaled for DDP's averaging.

        Args:
            values: (B,) per-sample values on this process.
            weight: (B,) 1 for samples, 0 for padding.
        """
        total = weight.sum()
        world = self.world_size
        if world > 1:
            torch.distributed.all_reduce(total)
        return world * (values * weight).sum() / total.clamp(min=1)

    def global_value(self, mean: Tensor) -> Tensor:
        """The value of a `global_mean` over all processes, without gradient."""
        value = mean.detach().clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(value)
            value /= self.world_size
        return value

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size()
        return 1


class StatisticsMethod(ForgettingMethod):
    """Base of the methods that make one pass over the data, sum statistics, and then edit.

    Subclasses add to registered buffers in `accumulate`, name them in `summed`, and change the
    weights in `edit`. The pass shows every sample exactly once in id order; sums over processes are
    reduced once at its end.
    """

    view: ClassVar[View | None] = "statistics"
    summed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Model, copy: bool | Literal["auto"] = "auto", seed: int = 0) -> None:
        super().__init__(model, copy=copy, seed=seed)
        self.automatic_optimization = False
        self.anchor = nn.Parameter(torch.zeros(1))  # DDP refuses a module without parameters

    @abstractmethod
    def accumulate(self, batch: Batch) -> None:
        """Add the statistics of one batch, each sample times its ``weight``.

        Args:
            batch: with an additional ``forget`` (B,) bool.
        """

    def on_train_epoch_start(self) -> None:
        """Statistics are taken in eval mode."""
        self.model.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate; there is no loss."""
        self.accumulate(batch)

    def on_train_epoch_end(self) -> None:
        """Add up all processes; one pass is all there is."""
        if self.trainer.world_size > 1:
            for name in (*self.summed, "sample_passes"):
                torch.distributed.all_reduce(self.get_buffer(name))
        self.trainer.should_stop = True

    def configure_optimizers(self) -> None:
        """No optimizer."""


def samples(batch: Batch) -> int:
    """Number of samples of a batch without its padding."""
    return int(batch["weight"].sum())


def detached_copy(model: Model) -> Model:
    """Deep copy of a model without the trainer that it may be attached to."""
    trainer = model._trainer
    model.trainer = None
    try:
        return cast(Model, copy.deepcopy(model))
    finally:
        if trainer is not None:
            model.trainer = trainer


def joined(batch: dict[str, Batch]) -> tuple[dict[str, Any], int]:
    """Concatenate the forget and the retain batch, so that one forward pass serves both.

    Returns:
        The joined batch, forget samples first, and the number of rows of the forget batch.
    """
    return stacked((batch["forget"], batch["retain"])), len(batch["forget"]["weight"])


def stacked(batches: Sequence[Batch]) -> dict[str, Any]:
    """One batch of the rows of several, with the columns that all of them have."""
    keys = set.intersection(*(set(batch) for batch in batches))
    return {
        key: torch.cat([batch[key] for batch in batches])
        if isinstance(batches[0][key], Tensor)
        else [value for batch in batches for value in batch[key]]
        for key in keys
    }
