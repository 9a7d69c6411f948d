"""SCRUB: move away from a frozen teacher on the forget set, stay with it on the retain set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.data.access import DataAccess
from mmforget.errors import ConfigurationError
from mmforget.methods.base import GradientMethod, OptimizerName, detached_copy, samples
from mmforget.models.base import Batch, HasFeatures, HasLogits, HasLoss, Model


class SCRUB(GradientMethod):
    r"""Student and teacher start as the same model; the teacher, a frozen deep copy, stays it.

    A *max* step minimises ``-KL(teacher || student)`` on forgotten samples, a *min* step minimises
    ``w_ce * CE + w_kl * KL(teacher || student)`` on retained ones; ``KL`` has temperature ``T``, is
    multiplied by ``T**2`` and averaged over samples. The paper makes a whole pass over the forget
    set, then one over the retain set. Here the two alternate within an epoch, step by step, until
    every forgotten sample was seen once; the rest of the epoch, and all epochs after the first
    `forget_epochs`, has min steps only. Each epoch thus shows every sample once, as in the paper.
    Reads forget inputs, retain inputs and labels.

    A known reimplementation makes its teacher by a shallow copy, which moves with the student; here
    a test holds its hash. Paper and released code exchange the names of the two weights in places,
    hence `w_ce` and `w_kl`. Gradient clipping and accumulation of the trainer are not available,
    because one batch may need two optimizer steps.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        freeze_bn: keep BatchNorm in eval mode in min steps too; in max steps it always is.
        temperature: ``T``, positive (released code: 2).
        w_ce: weight of the cross-entropy in min steps (released code: 1, or 0.99).
        w_kl: weight of the divergence in min steps (released code: 0.5, or 0.01; with few
            retained samples a larger one keeps more).
        forget_epochs: number of first epochs with max steps (released code: 2 or 3).

    Reference:
        M. Kurmanji, P. Triantafillou, J. Hayes, E. Triantafillou: Towards Unbounded Machine
        Unlearning, NeurIPS 2023, arXiv 2302.09880.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasLogits, HasFeatures)
    access: ClassVar[DataAccess] = DataAccess(forget_labels=False)

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        freeze_bn: bool = True,
        temperature: float = 2.0,
        w_ce: float = 1.0,
        w_kl: float = 5.0,
        forget_epochs: int = 3,
    ) -> None:
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
            freeze_bn=freeze_bn,
        )
        if not temperature > 0:
            raise ConfigurationError(f"`temperature` is {temperature}, it must be positive")
        if forget_epochs < 1:
            raise ConfigurationError(f"`forget_epochs` is {forget_epochs}, it must be at least 1")
        self.temperature, self.w_ce, self.w_kl = temperature, w_ce, w_kl
        self.forget_epochs = forget_epochs
        self.automatic_optimization = False
        self.teacher: Any = detached_copy(self.model).requires_grad_(False).eval()
        self._phase: Literal["max", "min"] = "min"

    def on_train_epoch_start(self) -> None:
        """The teacher stays in eval mode."""
        super().on_train_epoch_start()
        self.teacher.eval()

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """A max step while the forget stream is in its first pass, and a min step."""
        forget = self.data.subset("train", "forget")
        first_pass = batch_idx * self.data.batch_size < len(forget)
        maximise = self.current_epoch < self.forget_epochs and first_pass
        optimizer: Any = self.optimizers()
        for phase in ("max", "min") if maximise else ("min",):
            self._enter(phase)  # type: ignore[arg-type]
            total = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(total)
            optimizer.step()

    def _enter(self, phase: Literal["max", "min"]) -> None:
        self._phase = phase
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(phase == "min" and not self.freeze_bn)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The terms of the current phase."""
        if self._phase == "max":
            part = batch["forget"]
            apart, _ = self._compare(part)
            return {"forget": -self.global_mean(apart, part["weight"])}
        part = batch["retain"]
        apart, features = self._compare(part)
        cross_entropy = self.model.loss(part, features=features)
        return {
            "retain": self.w_ce * self.global_mean(cross_entropy, part["weight"]),
            "teacher": self.w_kl * self.global_mean(apart, part["weight"]),
        }

    def _compare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Divergence of the student from the teacher (B,), and the student's features (B, d)."""
        with torch.no_grad():
            teacher = F.log_softmax(self.teacher.logits(batch) / self.temperature, dim=-1)
        features = self.model.features(batch)
        logits = self.model.logits(batch, features=features)
        student = F.log_softmax(logits / self.temperature, dim=-1)
        apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * apart, features

    def count(self, batch: Any) -> None:
        """Student forward and backward, teacher forward, over the samples of the phase."""
        forget = samples(batch["forget"]) if self._phase == "max" else 0
        retain = samples(batch["retain"]) if self._phase == "min" else 0
        self.spend(forget, retain, backward=True)
        self.spend(forget, retain)

    def on_train_epoch_end(self) -> None:
        """The schedule steps once per epoch; with manual optimization nobody else does it."""
        schedule: Any = self.lr_schedulers()
        schedule.step()
