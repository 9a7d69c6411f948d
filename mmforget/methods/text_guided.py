"""The frame of the methods that make a text-conditioned model forget concepts."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from mmforget.concept import ConceptSpec, check_together
from mmforget.data.access import DataAccess
from mmforget.data.base import GlobalBatchSampler, View
from mmforget.data.denoising import DenoisingRecords
from mmforget.errors import ConfigurationError
from mmforget.methods.base import ForgettingMethod, GradientMethod, OptimizerName, joined
from mmforget.models.base import Generates, Model, PromptEmbedding, Sites, TextConditioned
from mmforget.models.weight_edit import WeightEdit

logger = logging.getLogger(__name__)

NO_DATA = DataAccess(forget_inputs=False, forget_labels=False, retain="none", retain_labels=False)
"""These methods read words, and pictures that the model itself makes; never a data set."""


class ConceptMethod(ForgettingMethod):
    """Base of all methods that erase concepts named in text.

    Args:
        model: a model that reads prompts, such as `DiffusionGenerator`.
        concepts: what to erase, one or several at once.
        copy, seed: see `ForgettingMethod`.

    Raises:
        RequestError: contradictory concepts, or words that the text encoder would truncate.
    """

    requires: ClassVar[tuple[type, ...]] = (TextConditioned,)
    access: ClassVar[DataAccess] = NO_DATA
    view: ClassVar[View | None] = None
    saves_adapter: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
        check_together(specs)
        for concept in specs:
            for kept in concept.contained():
                logger.warning(
                    "'%s' is preserved, but contains an erased word of '%s'", kept, concept.target
                )
        super().__init__(model, copy=copy, seed=seed)
        self.concepts = specs
        self.model.check_length(
            [
                prompt
                for concept in specs
                for word in (*concept.words, *concept.preserve, concept.anchor_text)
                for prompt in concept.prompts(word)
            ]
        )

    @abstractmethod
    def weight_edit(self) -> WeightEdit:
        """What `finalize` changed, as a thing of its own."""

    def statistics(self) -> dict[str, Any]:
        """The concepts."""
        return {"concepts": [concept.to_dict() for concept in self.concepts]}


class DenoisingMethod(ConceptMethod, GradientMethod):
    """Base of the methods that fine-tune the denoiser by regression on `DenoisingRecords`.

    Subclasses make the records from the frozen model, once, and choose the weights. The loss is
    ``mean_forget |eps(x, t, c) - target|^2 + retain_weight * mean_retain |...|^2``, both means over
    all elements. Needs no data module: ``Trainer(max_steps=200).fit(method)``.

    Args:
        model, concepts: see `ConceptMethod`.
        copy, seed, lr, weight_decay, optimizer: see `GradientMethod`. The learning rate falls to a
            tenth along a cosine over all steps.
        batch_size: forget records per step, over all processes.
        retain_batch_size: retain records per step.
        retain_weight: weight of the retain loss, 0 or more.

    Raises:
        ModelError: half precision on the CPU.
    """

    requires: ClassVar[tuple[type, ...]] = (TextConditioned, Generates, Sites)
    view: ClassVar[View | None] = "paired"

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adam",
        batch_size: int = 4,
        retain_batch_size: int = 4,
        retain_weight: float = 1.0,
    ) -> None:
        # GradientMethod's arguments are set here because the two bases take different ones.
        ConceptMethod.__init__(self, model, concepts, copy=copy, seed=seed)
        self.check_training(lr, optimizer)
        for name, value in (("batch_size", batch_size), ("retain_batch_size", retain_batch_size)):
            if value < 1:
                raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")
        if retain_weight < 0:
            raise ConfigurationError(f"`retain_weight` is {retain_weight}, it must be 0 or more")
        self.model.require_full_precision(f"{type(self).__name__}")
        self.lr, self.lr_min, self.weight_decay = lr, lr / 10, weight_decay
        self.optimizer_name, self.freeze_bn = optimizer, True
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.retain_weight = retain_weight
        self.records: dict[str, DenoisingRecords] = {}
        self._table: PromptEmbedding | None = None
        self._before: dict[str, Tensor] = {}
        self.model.requires_grad_(False)
        for parameter in self.trained():
            parameter.requires_grad_(True)
        names = {id(p): n for n, p in self.model.network.named_parameters()}
        self._before = {names[id(p)]: p.detach().clone() for p in self.trained()}

    # ---- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters of the denoiser that are trained; never empty."""

    @abstractmethod
    def forget_records(self) -> DenoisingRecords:
        """What the student shall answer to prompts with the concepts."""

    @abstractmethod
    def retain_records(self) -> DenoisingRecords | None:
        """What it shall go on answering to the rest; None without preserved concepts."""

    # ---- data -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make the records; the same on every process and after a resume."""
        if self.records:
            return
        self.model.eval()
        records = {"forget": self.forget_records()}
        retained = self.retain_records() if self.retain_weight else None
        if retained is not None:
            records["retain"] = retained
        with torch.no_grad():
            table = self.model.encode([p for r in records.values() for p in r.prompts])
        self.records, self._table = records, table

    def teardown(self, stage: str) -> None:
        """Nothing to lift: there is no data module."""

    def train_dataloader(self) -> CombinedLoader:
        """Pairs of batches; the shorter stream is cycled until the longer one ends."""
        sizes = {"forget": self.batch_size, "retain": self.retain_batch_size}
        epoch = int(self.trainer.fit_loop.epoch_progress.current.processed)
        loaders = {
            name: DataLoader(
                records,
                sampler=GlobalBatchSampler(
                    records, sizes[name], True, self.seed, f"denoising-{name}", epoch
                ),
                batch_size=None,
            )
            for name, records in self.records.items()
        }
        return CombinedLoader(loaders, mode="max_size_cycle")

    # ---- training -------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Denoisers train in eval mode, since dropout would blur the teacher's answers."""
        self.model.eval()

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Regression on both streams, in one forward pass."""
        assert self._table is not None
        offset = len(self.records["forget"].prompts)
        if "retain" in batch:
            moved = dict(batch["retain"], prompt=batch["retain"]["prompt"] + offset)
            both, size = joined({"forget": batch["forget"], "retain": moved})
        else:
            both, size = dict(batch["forget"]), len(batch["forget"]["weight"])
        device = both["noisy"].device
        table = PromptEmbedding(
            self._table.states.to(device, both["noisy"].dtype),
            None
            if self._table.pooled is None
            else self._table.pooled.to(device, both["noisy"].dtype),
        )
        found = self.model.predict(both["noisy"], both["time"], table[both["prompt"]])
        error = (found - both["target"]).square().flatten(1).mean(1)
        weight = both["weight"].to(error)
        terms = {"forget": self.global_mean(error[:size], weight[:size])}
        if "retain" in batch:
            terms["retain"] = self.retain_weight * self.global_mean(error[size:], weight[size:])
        return terms

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the step."""
        kept = int(batch["retain"]["weight"].sum()) if "retain" in batch else 0
        self.spend(int(batch["forget"]["weight"].sum()), kept, backward=True)

    def configure_optimizers(self) -> Any:
        """The optimizer with a cosine over all steps instead of epochs."""
        settings = super().configure_optimizers()
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            settings["optimizer"], steps, self.lr_min
        )
        settings["lr_scheduler"] = {"scheduler": schedule, "interval": "step"}
        return settings

    # ---- the end --------------------------------------------------------------------------------

    def weight_edit(self) -> WeightEdit:
        """The trained parameters, whole."""
        now = dict(self.model.network.named_parameters())
        return WeightEdit(
            self.model.component,
            tensors={name: now[name].detach().clone() for name in self._before},
        )

    def save_adapter(self, folder: Path) -> None:
        """Write `weight_edit` into a folder."""
        self.weight_edit().save(folder)  # type: ignore[attr-defined]
