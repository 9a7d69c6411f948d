"""MMUnlearner: forget what an entity looks like, in the weights that matter for little else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.data.split import Role
from mmforget.errors import ConfigurationError, NoOpError, suggest
from mmforget.methods.answer_losses import ascent
from mmforget.methods.answer_unlearning import AnswerUnlearning, DecoupleWeight, Heard
from mmforget.methods.base import OptimizerName, samples
from mmforget.methods.gradient_ascent import check_bound
from mmforget.methods.importance import PerSampleImportance
from mmforget.methods.saliency import MaskedTraining, flat_gradients
from mmforget.models.base import Batch, Model
from mmforget.models.multimodals.base import Part

Modules = Literal["vision", "language", "both"]
PARTS: dict[Modules, tuple[Part, ...]] = {
    "vision": ("vision", "projector"),
    "language": ("language",),
    "both": ("vision", "projector", "language"),
}
MATRICES = ("proj", "fc", "linear", "mlp", "qkv")
"""Parts of the names of the matrices that get a mask."""
EPSILON = 1e-15


class MMUnlearner(MaskedTraining, AnswerUnlearning):
    r"""Gradient ascent and descent on the weights that are salient for the forget set alone.

    Before training, with ``F`` the mean squared gradient of the loss at the original weights, a
    weight is selected where ::

        (F_forget + eps) / (F_retain + eps) >= threshold

    among the matrices whose name has a part in `MATRICES`; one that has no gradient on the forget
    set is never selected. Every step then descends on a batch of
    the retain set; spread evenly over the epoch, and once for every forgotten sample, it first
    ascends on a batch of the forget set. With Prompt Decouple, the descent has its term too. Reads
    forget and retain inputs and labels. Which retained questions there are decides what is kept:
    for the language part the paper keeps questions without picture about all entities as well,
    which is what the digit questions do by default.

    Differs from the released code, where the descent is not masked, weight decay and the momentum
    of AdamW move what is masked, weights without mask are trained freely, the forget loader ends
    unnoticed, and the rate changes only once per epoch of one: here weights outside of the mask
    keep their bits.

    Args:
        model, copy, seed, lr, lr_min, optimizer: see `GradientMethod`. There is no weight decay.
        modules: where weights are selected: in tower and projector, in the language model, or in
            both.
        threshold: positive (paper: 1); the higher, the fewer weights.
        mask_scope: ``both`` masks ascent and descent, ``forget`` the ascent only.
        missing: what happens to weights of these modules that are no such matrices: ``freeze``, or
            ``free`` (the released code).
        fisher: mean over the squared gradients of ``batch`` means (released code; it depends on the
            batch size) or of single samples.
        clip: norm to which gradients are clipped before they are masked, positive.
        max_forget_loss: see `GradientAscent`.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.

    Raises:
        CapabilityError: the model answers no questions, or does not name its parts.
        ConfigurationError: a setting out of range.
        NoOpError: no weight is selected (raised when training starts).

    Reference:
        J. Huo et al.: MMUnlearner: Reformulating Multimodal Machine Unlearning in the Era of
        Multimodal Large Language Models, Findings of ACL 2025, arXiv 2502.11051.
    """

    access: ClassVar[DataAccess] = DataAccess()

    mask: Tensor

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-5,
        lr_min: float = 0.0,
        optimizer: OptimizerName = "adamw",
        modules: Modules = "both",
        threshold: float = 1.0,
        mask_scope: Literal["both", "forget"] = "both",
        missing: Literal["freeze", "free"] = "freeze",
        fisher: Literal["batch", "sample"] = "batch",
        clip: float = 1.0,
        max_forget_loss: float | None = None,
        decouple_weight: DecoupleWeight = None,
    ) -> None:
        for name, value, valid in (
            ("modules", modules, get_args(Modules)),
            ("mask_scope", mask_scope, ("both", "forget")),
            ("missing", missing, ("freeze", "free")),
            ("fisher", fisher, ("batch", "sample")),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        for name, number in (("threshold", threshold), ("clip", clip)):
            if not number > 0:
                raise ConfigurationError(f"`{name}` is {number}, it must be positive")
        check_bound(max_forget_loss)
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            optimizer=optimizer,
            trained=PARTS[modules],
            decouple_weight=decouple_weight,
        )
        self.automatic_optimization = False
        self.freeze_mode = "strict"
        self.threshold, self.mask_scope, self.missing = threshold, mask_scope, missing
        self.fisher, self.clip, self.max_forget_loss = fisher, clip, max_forget_loss
        self._phase: Literal["ascent", "descent"] = "descent"
        self._waiting: list[Batch] = []
        self._report: dict[str, Any] = {}
        size = sum(p.numel() for p in self._trained())
        # A buffer, so that a resumed run has it; all False means that it is not made yet.
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool))

    # ---- the mask ---------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Make the mask, once, at the original weights."""
        if not self.mask.any():
            self.mask.copy_(self.salient())

    def salient(self) -> Tensor:
        """The mask (P,) as one vector over all trained weights.

        Raises:
            NoOpError: it would be empty.
        """
        self.model.eval()
        score = self._importance_by_batch if self.fisher == "batch" else self._importance_by_sample
        forget, retain = score("forget"), score("retain")
        self.model.train()
        chosen = (forget + EPSILON) / (retain + EPSILON) >= self.threshold
        chosen &= forget > 0
        matrix = self._matrices()
        selected = torch.where(matrix, chosen, self.missing == "free")
        if not (selected & matrix).any():
            raise NoOpError(
                "MMUnlearner would change nothing: no weight matters to the forget set at least "
                f"{self.threshold:g} times as much as to the rest; lower `threshold`"
            )
        return selected

    def _matrices(self) -> Tensor:
        """(P,) bool: weights of the matrices that get a mask."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return torch.cat(
            [
                torch.full(
                    (p.numel(),),
                    p.ndim > 1 and any(word in names[id(p)] for word in MATRICES),
                    device=self.mask.device,
                )
                for p in self._trained()
            ]
        )

    def _passed(self, role: Role) -> Iterator[Batch]:
        """All training samples of a role, in order; counted."""
        for batch in self.data.loader(self.data.subset("train", role)):
            moved = self.transfer_batch_to_device(batch, self.device, 0)
            number = samples(moved)
            self.spend(*((number, 0) if role == "forget" else (0, number)), backward=True)
            yield moved

    def _importance_by_batch(self, role: Role) -> Tensor:
        trained = self._trained()
        total, batches = torch.zeros(len(self.mask), device=self.mask.device), 0
        for batch in self._passed(role):
            losses = self.model.answer_logits(batch).losses()
            loss = self.mean(losses, batch["weight"]) / self.world_size
            gradient = flat_gradients(loss, trained)
            if self.world_size > 1:
                torch.distributed.all_reduce(gradient)
            total += gradient.square_()
            batches += 1
        return total / max(1, batches)

    def _importance_by_sample(self, role: Role) -> Tensor:
        importance = PerSampleImportance(self.model, "empirical_fisher")
        sums = torch.zeros(1, len(self.mask) + 1, dtype=torch.float64, device=self.mask.device)
        total, number = sums[:, :-1], sums[:, -1]
        for batch in self._passed(role):
            importance.add(batch, batch["weight"][None], total)
            number += batch["weight"].sum()
        importance.flush(total)
        if self.world_size > 1:
            torch.distributed.all_reduce(sums)
        return (total[0] / number.clamp(min=1)).float()

    # ---- the steps --------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Begin the forget set anew."""
        super().on_train_epoch_start()
        self._waiting.clear()
        # the loader of the forget set, without its repeats
        self._batches = -(-len(self.data.subset("train", "forget")) // self.data.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """An ascent, where one is due, and a descent."""
        if batch_idx < self._batches:
            self._waiting.append(batch["forget"])
        every = max(1, int(self.trainer.num_training_batches) // self._batches)
        if self._waiting and batch_idx % every == 0:
            self._step("ascent", batch | {"forget": self._waiting.pop(0)}, batch_idx)
        self._step("descent", batch, batch_idx)

    def _step(self, phase: Literal["ascent", "descent"], batch: Any, batch_idx: int) -> None:
        self._phase = phase
        optimizer: Any = self.optimizers()
        total = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(total)
        nn.utils.clip_grad_norm_(self._trained(), self.clip)
        clear = self.mask_scope == "both"
        with self.holding(optimizer, clear) if self._masks() else nullcontext():
            optimizer.step()

    def _masks(self) -> bool:
        return self._phase == "ascent" or self.mask_scope == "both"

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the gradients of the steps that are masked."""
        if self._masks():
            super().on_before_optimizer_step(optimizer)

    def streams(self, batch: Any) -> dict[str, Batch]:
        """The stream of the ascent, or those of the descent."""
        found = super().streams(batch)
        return {
            name: part
            for name, part in found.items()
            if (name == "forget") == (self._phase == "ascent")
        }

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The terms of the current phase."""
        heard = self.heard(batch)
        if self._phase == "ascent":
            return {"forget": self.forget_term(heard)}
        return {"retain": self.retain_term(heard["retain"])} | self.decoupled(heard)

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The negated loss, bounded if wanted."""
        forget = heard["forget"]
        return self.mean(ascent(forget.found.losses(), self.max_forget_loss), forget.weight)

    def on_train_epoch_end(self) -> None:
        """The schedule steps once per epoch; with manual optimization nobody else does it."""
        schedule: Any = self.lr_schedulers()
        schedule.step()

    # ---- the end ----------------------------------------------------------------------------

    def edit(self) -> None:
        """Count what the mask has selected."""
        super().edit()
        names = {id(p): name for name, p in self.model.network.named_parameters()}
        shares: dict[str, list[int]] = {}
        for parameter, part in self._masked():
            count = shares.setdefault(self._part(names[id(parameter)]), [0, 0])
            count[0] += int(part.sum())
            count[1] += part.numel()
        self._report = {
            "mask_fraction": float(self.mask.double().mean()),
            "mask_fraction_by_part": {part: done / all_ for part, (done, all_) in shares.items()},
        }

    def statistics(self) -> dict[str, Any]:
        """Share of the weights that the mask selects, as a whole and by part of the network."""
        return super().statistics() | self._report
