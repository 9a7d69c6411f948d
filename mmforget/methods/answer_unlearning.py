"""The frame of the methods that unlearn answers: streams, terms, Prompt Decouple, adapters."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import ForgetDataModule
from mmforget.data.questions import QuestionDataModule
from mmforget.errors import CapabilityError, ConfigurationError, suggest
from mmforget.methods.answer_losses import SequenceNorm, divergence
from mmforget.methods.base import GradientMethod, OptimizerName, samples, stacked
from mmforget.methods.low_rank import LowRankAdapters, TrainedCheckpoint
from mmforget.methods.reference import Reference, ReferenceKind
from mmforget.models.base import (
    Answers,
    Batch,
    HasLoss,
    Model,
    Sites,
    check_capabilities,
)
from mmforget.models.multimodal import AnswerLogits, AnswerLosses
from mmforget.models.multimodals.base import Part

logger = logging.getLogger(__name__)

RetainTerm = Literal["ce", "kl", "none"]
DecoupleWeight = float | Literal["auto"] | None
RETAINED = ("retain", "decouple")
"""Streams of retained samples; all others are of forgotten ones."""


class Heard(NamedTuple):
    """One stream of a step.

    Attributes:
        batch: its samples.
        found: what the model says at their answers.
        before: what the original model says there, if it was asked.
    """

    batch: Batch
    found: AnswerLogits
    before: AnswerLogits | None = None

    @property
    def weight(self) -> Tensor:
        """(B,) 1 for samples, 0 for padding."""
        weight: Tensor = self.batch["weight"]
        return weight


class AnswerUnlearning(TrainedCheckpoint, GradientMethod):
    r"""Base of the methods that make a model of questions and answers forget some answers.

    ::

        L = forget_term + retain_weight * retain_term + decouple_weight * CE(decouple)

    All terms come from one forward pass over the streams ``forget``, ``retain`` and ``decouple``,
    of which a method uses what it needs. Subclasses implement `forget_term`.

    **Prompt Decouple**: a model that is to refuse a question about some pictures learns to refuse
    the question. The stream ``decouple`` has retained pictures with the questions of the forget set
    and their true answers. `decouple_weight` adds their cross-entropy to any method and selects the
    data view ``decoupled``; ``auto`` is the weight of the released code:

    =======================  ===========================================
    gradient ascent          ``-CE(f) + 0.5 CE(decouple)``
    gradient difference      ``-CE(f) + 0.5 CE(r) + 0.5 CE(decouple)``
    KL minimisation          ``-CE(f) + KL(r) + CE(decouple)``
    preference optimisation  ``CE(f as refusals, and r) + CE(decouple)``
    all others (ours)        weight 1
    =======================  ===========================================

    **Sums**: with several processes all means are those of the global batch. Batches that the
    trainer accumulates (``accumulate_grad_batches``) give the step of one large batch for
    ``seq_norm`` ``token`` and ``sequence``; for ``batch_token`` only if they have equal numbers of
    labelled tokens.

    An early stop is Lightning's, for example ``EarlyStopping("loss/forget",
    stopping_threshold=-4.0, check_on_train_epoch_end=True)``.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`. Weights of one
            dimension are exempt from weight decay.
        trained: parts of the network that are trained; None takes those that train in the model
            as it is given.
        rank: train adapters of this rank in the feed-forward and attention layers of the parts
            that the model calls `adapted`, instead of their weights; other parts that `trained`
            names are trained as a whole. None trains weights only.
        lora_alpha: the scale of the adapters is ``lora_alpha / rank``.
        retain: the retain term: cross-entropy, divergence from the original model, or none.
        retain_weight: its weight; ``auto`` is 1.
        decouple_weight: see above; None or 0: no Prompt Decouple.
        seq_norm: how means are taken over answers of different lengths.
        reference: how the original model is kept, where the method needs it; see `Reference`.

    Raises:
        CapabilityError: the model answers no questions, or does not name its parts.
        ConfigurationError: a setting out of range, or nothing to train.

    Reference:
        J. Chen et al.: SafeEraser: Enhancing Safety in Multimodal Large Language Models through
        Multimodal Machine Unlearning, 2025, arXiv 2502.12520 (Prompt Decouple).
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, Answers)
    access: ClassVar[DataAccess] = DataAccess(retain="fraction")
    needs_reference: ClassVar[frozenset[str]] = frozenset()
    """Streams that the forget term passes through the original model."""
    published_decouple_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        trained: Sequence[Part] | None = None,
        rank: int | None = None,
        lora_alpha: float = 16.0,
        retain: RetainTerm = "ce",
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        seq_norm: SequenceNorm = "batch_token",
        reference: ReferenceKind = "auto",
    ) -> None:
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
        )
        for name, value, valid in (
            ("retain", retain, get_args(RetainTerm)),
            ("seq_norm", seq_norm, get_args(SequenceNorm)),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        decouple = self.published_decouple_weight if decouple_weight == "auto" else decouple_weight
        self.decouple_weight = float(decouple or 0.0)
        self.retain_weight = 1.0 if retain_weight == "auto" else float(retain_weight)
        for name, number in (
            ("decouple_weight", self.decouple_weight),
            ("retain_weight", self.retain_weight),
        ):
            if not number >= 0:
                raise ConfigurationError(f"`{name}` is {number}, it must not be negative")
        self.retain: RetainTerm = retain if self.retain_weight else "none"
        self.seq_norm: SequenceNorm = seq_norm
        self._choose_data()
        self.adapters = self._prepare(trained, rank, lora_alpha)
        self._table = self.trainable()
        self.saves_adapter = self.adapters is not None and all(  # type: ignore[misc]
            ".lora_" in name for name, p in self.model.named_parameters() if p.requires_grad
        )
        self.reference: Reference | None = None
        if self.referred:
            self.reference = Reference(self.model, self.adapters, reference)

    # ---- what is trained --------------------------------------------------------------------

    def _prepare(
        self, trained: Sequence[Part] | None, rank: int | None, lora_alpha: float
    ) -> LowRankAdapters | None:
        """Freeze and unfreeze parts of the network, and attach adapters."""
        network = self.model.network
        if trained is not None and (not trained or set(trained) - set(get_args(Part))):
            raise ConfigurationError(
                f"`trained` is {list(trained)}; name one or more of {', '.join(get_args(Part))}"
            )
        adapters = None
        chosen = set(trained or ())
        if rank is not None:
            check_capabilities(f"{type(self).__name__} with `rank`", self.model, (Sites,))
            sites = self.model.sites("ffn") + self.model.sites("attention")
            inside = {self._part(site.name) for site in sites} if trained is not None else set()
            if trained is not None and not chosen & inside:
                raise ConfigurationError(
                    f"`rank` is {rank}, but `trained` is {list(trained)}, without the adapted "
                    f"parts {sorted(inside)}; add one of them, or set `rank` to None"
                )
            adapters = LowRankAdapters(network, sites, rank, lora_alpha, self.seed)
            chosen -= inside
        if trained is not None:
            for name, parameter in network.named_parameters():
                if ".lora_" not in name:
                    parameter.requires_grad_(self._part(name) in chosen)
        if not any(p.requires_grad for p in network.parameters()):
            raise ConfigurationError(
                f"`trained` is {trained and list(trained)}, where {type(network).__name__} has no "
                "weights to train; name other parts"
            )
        return adapters

    def _part(self, name: str) -> str:
        part = getattr(getattr(self.model, "family", None), "part", None)
        if part is None:
            raise CapabilityError(
                f"`trained` names parts of the network, which {type(self.model).__name__} does not "
                "tell apart; leave it out, and freeze what shall stay before"
            )
        return str(part(name))

    def trainable(self) -> dict[str, int]:
        """Number of trained weights by part of the network, parts without any included."""
        try:
            found = {part: 0 for part in get_args(Part)}
            for name, parameter in self.model.network.named_parameters():
                found[self._part(name)] += parameter.numel() * parameter.requires_grad
        except CapabilityError:
            return {"all": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}
        return found

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All trained weights; those of one dimension without weight decay."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # ---- data -------------------------------------------------------------------------------

    def _choose_data(self) -> None:
        """View and access of this instance, from its terms."""
        if self.decouple_weight:
            view: Any = "decoupled"
        else:
            view = "forget" if self.retain == "none" else "paired"
        self.view = view  # type: ignore[misc]  # narrower than that of the class
        reads: Any = "none" if view == "forget" else "fraction"
        self.access = replace(type(self).access, retain=reads)  # type: ignore[misc]

    def bind(self, data: ForgetDataModule) -> None:
        """Connect the data.

        Raises:
            ConfigurationError: the data has no questions.
        """
        if not isinstance(data, QuestionDataModule):
            why = (
                f"`decouple_weight` is {self.decouple_weight:g}, which needs pictures of others "
                "with the same questions"
                if self.decouple_weight
                else f"{type(self).__name__} unlearns answers to questions"
            )
            raise ConfigurationError(
                f"{why}, but `data` {type(data).__name__} has none; take DigitQuestions or another "
                "QuestionDataModule"
            )
        super().bind(data)

    def streams(self, batch: Any) -> dict[str, Batch]:
        """The batches that this method uses, by stream."""
        if self.view == "forget":
            return {"forget": batch}
        used = {"forget": True, "retain": self.retain != "none", "decouple": self.decouple_weight}
        return {name: part for name, part in batch.items() if used[name]}

    # ---- the objective ----------------------------------------------------------------------

    def said(self, streams: Mapping[str, Batch]) -> dict[str, AnswerLogits]:
        """What the model says at the answers of every stream, from one forward pass."""
        found = self.model.answer_logits(stacked(list(streams.values())))
        return self._apart(found, streams)

    def original(self, streams: Mapping[str, Batch]) -> dict[str, AnswerLogits]:
        """What the original model says there."""
        assert self.reference is not None  # made for every method that asks
        found = self.reference.answer_logits(self.model, stacked(list(streams.values())))
        return self._apart(found, streams)

    @staticmethod
    def _apart(found: AnswerLogits, streams: Mapping[str, Batch]) -> dict[str, AnswerLogits]:
        parts, start = {}, 0
        for name, batch in streams.items():
            rows = slice(start, start := start + len(batch["weight"]))
            parts[name] = AnswerLogits(*(values[rows] for values in found))
        return parts

    @property
    def referred(self) -> frozenset[str]:
        """Streams that go through the original model as well."""
        kept = frozenset({"retain"}) if self.retain == "kl" else frozenset()
        return self.needs_reference | kept

    def heard(self, batch: Any) -> dict[str, Heard]:
        """Ask the model, and where it is needed the original, about all streams of a step."""
        streams = self.streams(batch)
        asked = {name: part for name, part in streams.items() if name in self.referred}
        before = self.original(asked) if asked else {}
        found = self.said(streams)
        return {n: Heard(part, found[n], before.get(n)) for n, part in streams.items()}

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The weighted terms of the streams."""
        heard = self.heard(batch)
        terms = {"forget": self.forget_term(heard)}
        if "retain" in heard:
            terms["retain"] = self.retain_weight * self.retain_term(heard["retain"])
        return terms | self.decoupled(heard)

    @abstractmethod
    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The weighted term of the forget stream."""

    def retain_term(self, retain: Heard) -> Tensor:
        """Cross-entropy of the retain stream, or its divergence from the original."""
        if self.retain == "kl":
            return self.mean(
                divergence(retain.found, cast(AnswerLogits, retain.before)), retain.weight
            )
        return self.mean(retain.found.losses(), retain.weight)

    def decoupled(self, heard: Mapping[str, Heard]) -> dict[str, Tensor]:
        """The term of Prompt Decouple, if it is wanted."""
        if "decouple" not in heard:
            return {}
        part = heard["decouple"]
        return {"decouple": self.decouple_weight * self.mean(part.found.losses(), part.weight)}

    def mean(
        self, losses: AnswerLosses, weight: Tensor, seq_norm: SequenceNorm | None = None
    ) -> Tensor:
        """Mean over the answers of the global batch; see `global_mean`.

        Args:
            losses: (B,) sums and numbers of tokens.
            weight: (B,) 1 for samples, 0 for padding.
            seq_norm: another way than that of the method.
        """
        norm = seq_norm or self.seq_norm
        if norm == "sequence":
            return self.global_mean(losses.total, weight)
        if norm == "token":
            return self.global_mean(losses.mean, weight)
        return self.global_mean(losses.mean, weight * losses.tokens)

    def count(self, batch: Any) -> None:
        """Count all streams, forward and backward, and what the original is asked."""
        number = {name: samples(part) for name, part in self.streams(batch).items()}
        asked = {name: n for name, n in number.items() if name in self.referred}
        for passes, backward in ((number, True), (asked, False)):
            kept = sum(n for name, n in passes.items() if name in RETAINED)
            self.spend(sum(passes.values()) - kept, kept, backward=backward)

    # ---- the end ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Say what is trained."""
        shown = ", ".join(f"{part} {number:,}" for part, number in self._table.items())
        logger.info("%s trains: %s", type(self).__name__, shown)

    def edit(self) -> None:
        """Merge the adapters."""
        if self.adapters is not None:
            self.adapters.merge()

    def restore(self) -> Model:
        """Give back the model bit by bit: the untouched original, or without its adapters."""
        adapters = self.adapters
        if self.copied or adapters is None or adapters.merged or not self.saves_adapter:
            return super().restore()
        adapters.unload()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return self.model

    def statistics(self) -> dict[str, Any]:
        """Trained weights by part of the network."""
        return {"trainable": self._table, "low_rank": self.adapters is not None}

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters of this request as a peft adapter folder. After `finalize`.

        Raises:
            ConfigurationError: `finalize` has not run yet, or weights were trained as well.
        """
        if self.adapters is None or not self.saves_adapter:
            super().save_adapter(folder)
        else:
            self.adapters.save(folder)
