"""NPO: gradient ascent that slows down as an answer becomes less likely than it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from mmforget.data.base import ForgetDataModule
from mmforget.errors import ConfigurationError
from mmforget.methods.answer_losses import npo_loss
from mmforget.methods.answer_unlearning import (
    AnswerUnlearning,
    DecoupleWeight,
    Heard,
    RetainTerm,
)
from mmforget.methods.base import OptimizerName, samples
from mmforget.methods.grad_diff import check_weight
from mmforget.methods.reference import KnownLosses, ReferenceKind, refuse_changing_pictures
from mmforget.models.base import Model
from mmforget.models.multimodals.base import Part


class NPO(AnswerUnlearning):
    r"""Negative preference optimisation: the answers of the forget set are the rejected ones.

    ::

        L = forget_weight * mean [-(2 / beta) log sigmoid(beta (nll - nll_original))]
            + retain_weight * retain term

    with ``nll`` the sum over the tokens of an answer, and the mean over the samples of the batch.
    ``-nll_original`` is the original model's, the one that is given. (MLLMU-Bench takes a model
    that was fine-tuned on the retain set as the reference, against its own paper, and one mean over
    the batch instead of sums per answer.) Reads forget inputs and labels and, with a retain term or
    Prompt Decouple, a part of the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, retain: see `AnswerUnlearning`.
        beta: positive; the larger, the earlier it slows down (paper: 0.1). Towards 0 it is gradient
            ascent.
        forget_weight: positive.
        retain_weight: ``auto`` is 1.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.
        reference: see `Reference`; also ``cache``, which passes the forget set through the original
            once and keeps one number per sample.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: a setting out of range, or ``cache`` with augmented pictures.

    Reference:
        R. Zhang, L. Lin, Y. Bai, S. Mei: Negative Preference Optimization: From Catastrophic
        Collapse to Effective Unlearning, COLM 2024, arXiv 2404.05868.
    """

    needs_reference: ClassVar[frozenset[str]] = frozenset({"forget"})

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
        beta: float = 0.1,
        forget_weight: float = 1.0,
        retain: RetainTerm = "ce",
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        reference: ReferenceKind | Literal["cache"] = "auto",
    ) -> None:
        self.cached = reference == "cache"
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
            trained=trained,
            rank=rank,
            lora_alpha=lora_alpha,
            retain=retain,
            retain_weight=retain_weight,
            decouple_weight=decouple_weight,
            reference="auto" if reference == "cache" else reference,
        )
        check_beta(beta)
        check_weight(forget_weight)
        self.beta, self.forget_weight = beta, forget_weight
        self.known: KnownLosses | None = None

    @property
    def referred(self) -> frozenset[str]:
        """Streams that go through the original model at every step."""
        return super().referred - (frozenset({"forget"}) if self.cached else frozenset())

    def bind(self, data: ForgetDataModule) -> None:
        """Connect the data; make room for what is kept of it."""
        super().bind(data)
        if self.cached:
            refuse_changing_pictures(data)
            ids = torch.from_numpy(self.data.subset("train", "forget").ids)
            if self.known is None or not torch.equal(self.known.ids.cpu(), ids.sort().values):
                self.known = KnownLosses(ids)

    def on_train_start(self) -> None:
        """Pass the forget set through the original once, unless a checkpoint brought the result."""
        if self.known is None or self.known.complete:
            return
        with torch.no_grad():
            self.model.eval()
            for batch in self.data.loader(self.data.subset("train", "forget")):
                moved = self.transfer_batch_to_device(batch, self.device, 0)
                real = moved["weight"] > 0
                found = self.model.answer_logits(moved).losses()
                self.known.fill(moved["id"][real], found.total[real])
                self.spend(forget=samples(moved))
            self.model.train()
        if self.world_size > 1:
            self.known.gather()

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The loss of the rejected answers; positive."""
        batch, found, before = heard["forget"]
        nll = found.losses().total
        if before is not None:
            reference = before.losses().total
        else:
            reference = cast(KnownLosses, self.known)[batch["id"]].to(nll)
        each = npo_loss(nll, reference, self.beta)
        return self.forget_weight * self.global_mean(each, batch["weight"])


def check_beta(beta: float) -> None:
    """Refuse a temperature without meaning.

    Raises:
        ConfigurationError: names the value.
    """
    if not beta > 0:
        raise ConfigurationError(f"`beta` is {beta}, it must be positive")
