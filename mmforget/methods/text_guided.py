"""The frame of the methods that make a text-conditioned model forget concepts."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmforget.concept import ConceptSpec, check_together
from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.data.denoising import DenoisingRecords, spread
from mmforget.data.record_stream import RecordStream
from mmforget.errors import ConfigurationError
from mmforget.methods.base import ForgettingMethod, OptimizerName, joined
from mmforget.methods.denoiser_training import DenoiserTraining
from mmforget.models.base import (
    Generates,
    Model,
    PromptEmbedding,
    Sites,
    TextConditioned,
)
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

    @property
    def preserved(self) -> list[str]:
        """What any of the concepts wants preserved, each text once."""
        return list(dict.fromkeys(kept for concept in self.concepts for kept in concept.preserve))

    @abstractmethod
    def weight_edit(self) -> WeightEdit:
        """What `finalize` changed, as a thing of its own."""

    def save_adapter(self, folder: Path) -> None:
        """Write `weight_edit` into a folder."""
        self.weight_edit().save(folder)

    def statistics(self) -> dict[str, Any]:
        """The concepts."""
        return {"concepts": [concept.to_dict() for concept in self.concepts]}


def at_least_one(**counts: int | None) -> None:
    """Refuse counts below 1; None stands for a default.

    Raises:
        ConfigurationError: names the setting and its value.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")


class DenoisingMethod(DenoiserTraining, ConceptMethod):
    """Base of the methods that fine-tune the denoiser by regression on `DenoisingRecords`.

    Subclasses make the records from the frozen model, once, and choose the weights. The loss is
    ``mean_forget |eps(x, t, c) - target|^2 + retain_weight * mean_retain |...|^2``, both means over
    all elements. Needs no data module: ``Trainer(max_steps=200).fit(method)``.

    Args:
        model, concepts: see `ConceptMethod`.
        copy, seed, lr, weight_decay, optimizer: see `DenoiserTraining`. The learning rate falls to
            a tenth along a cosine over all steps.
        batch_size: forget records per step, over all processes.
        retain_batch_size: retain records per step.
        retain_weight: weight of the retain loss, 0 or more.
        clip: largest norm of a step's gradient, unless the trainer has a `gradient_clip_val`.

    Raises:
        ModelError: half precision on the CPU.

    Note for subclasses: `trained` is called by this constructor, so set what it needs before.
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
        clip: float = 1.0,
    ) -> None:
        ConceptMethod.__init__(self, model, concepts, copy=copy, seed=seed)
        at_least_one(batch_size=batch_size, retain_batch_size=retain_batch_size)
        if not retain_weight >= 0:
            raise ConfigurationError(f"`retain_weight` is {retain_weight}, it must be 0 or more")
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.retain_weight = retain_weight
        self.records: dict[str, DenoisingRecords] = {}
        self._table: PromptEmbedding | None = None
        self.prepare(lr, weight_decay, optimizer, clip)

    # ---- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def forget_records(self) -> DenoisingRecords:
        """What the student shall answer to prompts with the concepts."""

    @abstractmethod
    def retain_records(self) -> DenoisingRecords | None:
        """What it shall go on answering to the rest; None without preserved concepts."""

    def shared_out(self, total: int | None, least: int) -> dict[str, int]:
        """Pictures per sentence with a preserved text, for `retain_records`.

        Args:
            total: pictures in all; None takes one per preserved text, and no less than `least`.
            least: see above.
        """
        groups = {
            kept: concept.prompts(kept) for concept in self.concepts for kept in concept.preserve
        }
        if not groups:
            return {}
        words, shares = list(groups.values()), dict[str, int]()
        for (word, sentence), number in spread(words, total or max(least, len(words))).items():
            text = words[word][sentence]
            shares[text] = shares.get(text, 0) + number
        return shares

    # ---- data -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make the records; the same on every process and after a resume.

        Lightning calls it before it loads a checkpoint, so that the model is still the frozen one,
        but also before it moves the model to its device.
        """
        if self.records:
            return
        self.model.to(self.trainer.strategy.root_device).eval()
        with self._autocast():
            self._make_records()

    def _make_records(self) -> None:
        records = {"forget": self.forget_records()}
        retained = self.retain_records() if self.retain_weight else None
        if retained is not None:
            records["retain"] = retained
        with torch.no_grad():
            table = self.model.encode([p for r in records.values() for p in r.prompts])
        self.records, self._table = records, table
        if self.global_rank == 0:  # every process makes them; the cost counts once
            self.spend(forget=records["forget"].passes)
            self.spend(retain=retained.passes if retained is not None else 0)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of both sets; an epoch goes once through the forget records."""
        sizes = {"forget": self.batch_size, "retain": self.retain_batch_size}
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(RecordStream(self.records, sizes, self.seed, first), batch_size=None)

    # ---- training -------------------------------------------------------------------------------

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Regression on both streams, in one forward pass."""
        assert self._table is not None
        offset = len(self.records["forget"].prompts)
        if "retain" in batch:
            moved = dict(batch["retain"], prompt=batch["retain"]["prompt"] + offset)
            both, size = joined({"forget": batch["forget"], "retain": moved})
        else:
            both, size = dict(batch["forget"]), len(batch["forget"]["weight"])
        table, like = self._table[both["prompt"].to(self._table.states.device)], both["noisy"]
        pooled = None if table.pooled is None else table.pooled.to(like)
        embedding = PromptEmbedding(table.states.to(like), pooled)
        with self._autocast():
            found = self.model.predict(both["noisy"], both["time"], embedding)
        error = (found.to(both["target"]) - both["target"]).square().flatten(1).mean(1)
        weight = both["weight"].to(error)
        terms = {"forget": self.global_mean(error[:size], weight[:size])}
        if "retain" in batch:
            terms["retain"] = self.retain_weight * self.global_mean(error[size:], weight[size:])
        return terms

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the step."""
        kept = int(batch["retain"]["weight"].sum()) if "retain" in batch else 0
        self.spend(int(batch["forget"]["weight"].sum()), kept, backward=True)

    # ---- the end --------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """The concepts, and the number of trained parameters."""
        return super().statistics() | {"trained_parameters": self.trained_parameters}
