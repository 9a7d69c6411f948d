"""SSD: dampen the weights that matter much more for the forget set than for all data."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import ForgetDataModule
from mmforget.errors import ConfigurationError, DivergenceError, NoOpError, suggest
from mmforget.methods.base import StatisticsMethod, samples
from mmforget.methods.importance import ImportanceKind, PerSampleImportance
from mmforget.models.base import (
    Batch,
    HasFeatures,
    HasLogits,
    HasLoss,
    Model,
    check_capabilities,
)

logger = logging.getLogger(__name__)

FLOAT64_PARAMETERS = 10_000_000
SEARCH_GRID = (0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
FORGET, RETAIN = 0, 1


class SSD(StatisticsMethod):
    r"""Selective Synaptic Dampening: one pass over the data, one edit, no gradient step.

    With the importance of every single weight for the forget set (``I_f``) and for a reference set
    (``I_D``, per sample, see `PerSampleImportance`)::

        where I_f > alpha * I_D:   theta *= min(lam * I_D / I_f, 1)

    Buffers are left alone. Reads forget and retain inputs once (sums only); labels only for the
    kind ``empirical_fisher`` and for ``search``.

    There are three ways to the threshold:

    * by default the ``ln(1 + 100 p)`` percent of weights with the largest ratio are selected, if it
      is above 1; ``p`` is the share of the forget set. Nothing is tuned;
    * `alpha_rel` or `alpha`. Since ``I_f / I_D`` cannot exceed ``1 / p``, a threshold is best given
      as a share of that ceiling, ``alpha_rel = alpha * p``. The published ``alpha = 10`` belongs to
      another estimator (squares of batch means, which depend on batch size and sample order) and
      selects nothing here when a tenth or more is forgotten;
    * `search` lowers `alpha_rel` until the validation set is forgotten.

    Not suited to forgetting single memorised samples: their importance profile is that of all data,
    or owns nearly all of it. Both cases are logged as warnings.

    Args:
        model, copy, seed: see `ForgettingMethod`.
        kind: importance; ``abs_l2_output`` is the label-free variant.
        alpha_rel: threshold as a share of the ceiling, in (0, 1); usual are 0.15 to 0.4.
        alpha: raw threshold, positive.
        lam: dampening, positive; at 1 a weight keeps ``I_D / I_f`` of itself.
        reference: ``D`` compares with all data, ``D_r`` with the retain set, whose ratios have no
            ceiling: but for a raw `alpha` the same weights are selected, and dampened more.
            ``auto`` is ``D_r`` for the default rule and ``D`` for a given threshold, as published.
        search: try `alpha_rel` from 0.6 down to 0.1 until at most `target` of the forget validation
            items are still recognised. Importance is computed once. A result found this way is
            tuned on validation data; report it as such.
        target: accuracy in [0, 1] on the forget part of the validation set to stop at.
        max_drop: accuracy in [0, 1] that the retain part of the validation set may lose.
        chunk: samples in one pass, see `PerSampleImportance`.

    Raises:
        ConfigurationError: a value out of range, or settings that exclude each other.
        NoOpError: the selection is empty (by construction: before any work), or the search finds no
            threshold within `max_drop`.

    Reference:
        J. Foster, S. Schoepf, A. Brintrup: Fast Machine Unlearning Without Retraining Through
        Selective Synaptic Dampening, AAAI 2024, arXiv 2308.07707. Label-free: Loss-Free Machine
        Unlearning, ICLR 2024 Tiny Papers, arXiv 2402.19308. Quantile: S. Schoepf, J. Foster,
        A. Brintrup: Parameter-Tuning-Free Data Entry Error Unlearning with Adaptive Selective
        Synaptic Dampening, arXiv 2402.10098.
    """

    access: ClassVar[DataAccess] = DataAccess(retain="statistics")
    summed: ClassVar[tuple[str, ...]] = ("sums", "counts")

    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        kind: ImportanceKind = "abs_l2_output",
        alpha_rel: float | None = None,
        alpha: float | None = None,
        lam: float = 1.0,
        reference: Literal["auto", "D", "D_r"] = "auto",
        search: bool = False,
        target: float = 0.0,
        max_drop: float = 0.05,
        chunk: int | None = None,
    ) -> None:
        super().__init__(model, copy=copy, seed=seed)
        for name, value, valid in (
            ("kind", kind, get_args(ImportanceKind)),
            ("reference", reference, ("auto", "D", "D_r")),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        if alpha_rel is not None and not 0 < alpha_rel < 1:
            raise ConfigurationError(
                f"`alpha_rel` is {alpha_rel}, it must lie between 0 and 1; at 1 nothing is selected"
            )
        if alpha is not None and not alpha > 0:
            raise ConfigurationError(f"`alpha` is {alpha}, it must be positive")
        if not lam > 0:
            raise ConfigurationError(f"`lam` is {lam}, it must be positive")
        given = {"alpha_rel": alpha_rel, "alpha": alpha, "search": search or None}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise ConfigurationError(
                f"`{chosen[0]}` and `{chosen[1]}` both choose the threshold; give one of them"
            )
        check_capabilities(
            f"SSD with kind '{kind}'",
            model,
            (HasLogits,) if kind == "abs_l2_output" else (HasLoss,),
        )
        if search and not isinstance(model, HasFeatures):
            raise ConfigurationError(
                f"`search` counts right answers, of which {type(model).__name__} gives none per "
                "sample; set `alpha_rel` instead"
            )
        if reference == "auto":
            reference = "D" if chosen else "D_r"
        self.kind, self.reference = kind, reference
        self.alpha_rel, self.alpha, self.lam = alpha_rel, alpha, lam
        self.search, self.target, self.max_drop = search, target, max_drop
        if kind == "abs_l2_output" and not search:
            self.access = DataAccess(  # type: ignore[misc]  # narrower than that of the class
                forget_labels=False, retain="statistics", retain_labels=False
            )
        self.importance = PerSampleImportance(self.model, kind, chunk)
        precise = self.importance.size < FLOAT64_PARAMETERS
        self.register_buffer(
            "sums",
            torch.zeros(2, self.importance.size, dtype=torch.float64 if precise else torch.float32),
        )
        self.register_buffer("counts", torch.zeros(2, dtype=torch.float64))
        self._report: dict[str, Any] = {}

    # ---- the pass -------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse a threshold above the ceiling before any work is done."""
        if self.alpha is None or self.reference != "D":
            return
        sizes = [len(self.data.subset("train", role)) for role in ("forget", "retain")]
        share = sizes[0] / sum(sizes)
        if self.alpha * share >= 1:
            raise NoOpError(
                f"SSD would change nothing: `alpha` is {self.alpha:g}, but the importance ratio "
                f"cannot exceed {1 / share:.3g} when {sizes[0]} of {sum(sizes)} samples are "
                "forgotten; use `alpha_rel` (0.33) or an `alpha` below that"
            )

    def accumulate(self, batch: Batch) -> None:
        """Add the per-sample importance of a batch to the sums of its two groups."""
        weight = batch["weight"]
        membership = torch.stack([weight * batch["forget"], weight * ~batch["forget"]])
        self.importance.add(batch, membership, self.sums)
        self.counts += membership.sum(1).double()
        forget = int(membership[FORGET].sum())
        self.spend(forget=forget, retain=samples(batch) - forget, backward=True)

    def on_train_epoch_start(self) -> None:
        """Begin from nothing, also when an interrupted pass is resumed."""
        super().on_train_epoch_start()
        self.importance.reset()
        self.sums.zero_()
        self.counts.zero_()

    def on_train_epoch_end(self) -> None:
        """Add the last samples, then add up all processes."""
        self.importance.flush(self.sums)
        self._check_finite("the end of the pass")
        super().on_train_epoch_end()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate, and refuse what is not finite."""
        super().training_step(batch, batch_idx)
        self._check_finite(f"step {batch_idx}")

    def _check_finite(self, place: str) -> None:
        if not torch.isfinite(self.sums.sum()):
            raise DivergenceError(
                f"SSD: the importance is not finite at {place}; check the images and the weights "
                "of the model"
            )

    # ---- the edit -------------------------------------------------------------------------------

    def importances(self) -> tuple[Tensor, Tensor]:
        """Mean importance per weight over the forget set and over the reference set, flat."""
        forget = self.sums[FORGET] / self.counts[FORGET]
        if self.reference == "D_r":
            return forget, self.sums[RETAIN] / self.counts[RETAIN]
        return forget, self.sums.sum(0) / self.counts.sum()

    @torch.no_grad()
    def edit(self) -> None:
        """Select and dampen.

        Raises:
            ConfigurationError: the pass over the data has not been made, or lacks a group.
            NoOpError: nothing is selected, or the search fails.
        """
        if not (self.counts > 0).all():
            n_forget, n_retain = (int(n) for n in self.counts)
            raise ConfigurationError(
                f"SSD has seen {n_forget} forget and {n_retain} retain samples and needs both; "
                "call `Trainer.fit(method, datamodule)` with the view 'statistics' first"
            )
        forget, reference = self.importances()
        share = float(self.counts[FORGET] / self.counts.sum())
        self._inspect(forget, share)
        if self.search:
            threshold = self._search(forget, reference, share)
        else:
            threshold = self._threshold(forget, reference, share)
        chosen = _selected(forget, reference, threshold)
        if not chosen.any():
            raise NoOpError(
                f"SSD selected no weight: no importance ratio exceeds {threshold:.3g} "
                f"(largest {float(_ratio(forget, reference).max()):.3g}); lower "
                "`alpha_rel`, or leave it to the quantile rule"
            )
        old = {n: p.clone() for n, p in self._weights().items()}
        self._dampen(chosen, forget, reference)
        layers = self.importance.views(chosen)
        self._report |= {
            "kind": self.kind,
            "reference": self.reference,
            "alpha": threshold,
            "forget_share": share,
            "selected": int(chosen.sum()),
            "selected_fraction": float(chosen.double().mean()),
            "selected_fraction_by_layer": {
                n: float(layer.double().mean()) for n, layer in layers.items()
            },
            "relative_change_by_layer": {
                n: float((p - old[n]).norm() / old[n].norm().clamp(min=1e-12))
                for n, p in self._weights().items()
            },
        }

    def _weights(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if n in self.importance.shapes}

    def _threshold(self, forget: Tensor, reference: Tensor, share: float) -> float:
        if self.alpha is not None:
            return self.alpha
        if self.alpha_rel is not None:
            return self._from_relative(self.alpha_rel, share)
        ratio = _ratio(forget, reference)
        ratio = ratio[ratio.isfinite() & (reference > 0)]
        kept = 1 - math.log1p(100 * share) / 100
        rank = min(max(math.ceil(kept * len(ratio)), 1), len(ratio))
        return max(float(ratio.kthvalue(rank).values), 1.0)

    def _from_relative(self, alpha_rel: float, share: float) -> float:
        """The raw threshold that selects the same weights for either reference."""
        if self.reference == "D":
            return alpha_rel / share
        return alpha_rel / share * (1 - share) / (1 - alpha_rel)

    def _dampen(self, chosen: Tensor, forget: Tensor, reference: Tensor) -> None:
        factor = torch.ones_like(forget)
        factor[chosen] = (self.lam * reference[chosen] / forget[chosen]).clamp(max=1)
        factors = self.importance.views(factor)
        for name, parameter in self._weights().items():
            scaled = parameter.to(factor.dtype) * factors[name]
            parameter.copy_(scaled)

    def _inspect(self, forget: Tensor, share: float) -> None:
        """Keep quantiles of the ratio to all data, and warn where the method is known to fail."""
        ratio = _ratio(forget, self.sums.sum(0) / self.counts.sum())
        ratio = ratio[forget > 0].sort().values
        if not len(ratio):
            raise NoOpError(
                "SSD selected no weight: the importance of all weights for the forget set is zero; "
                f"use another `kind` than '{self.kind}'"
            )
        at = {q: float(ratio[int(q * (len(ratio) - 1))]) for q in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)}
        self._report["ratio_quantiles"] = {f"{q:g}": value for q, value in at.items()}
        self._report["ratio_ceiling"] = 1 / share
        if 0.8 <= at[0.5] <= 1.25:
            logger.warning(
                "SSD: the forget set looks like all data (median importance ratio %.2f), so the "
                "selection is weak; SSD is not suited to samples without a concept in common",
                at[0.5],
            )
        if at[0.5] > 0.5 / share:
            logger.warning(
                "SSD: nearly all importance belongs to the forget set (median ratio %.2f of at "
                "most %.2f), so the edit may destroy the model; check the retain accuracy",
                at[0.5],
                1 / share,
            )

    # ---- line search ----------------------------------------------------------------------------

    def _search(self, forget: Tensor, reference: Tensor, share: float) -> float:
        """Largest relative threshold that forgets; the weights are back as they were afterwards."""
        original = {n: p.clone() for n, p in self._weights().items()}
        start, trials = self._accuracy("retain"), []
        try:
            for alpha_rel in SEARCH_GRID:
                threshold = self._from_relative(alpha_rel, share)
                self._dampen(_selected(forget, reference, threshold), forget, reference)
                reached, kept = self._accuracy("forget"), self._accuracy("retain")
                trials.append({"alpha_rel": alpha_rel, "forget": reached, "retain": kept})
                if start - kept > self.max_drop:
                    break
                if reached <= self.target:
                    self._report["search"] = trials
                    return threshold
                self._restore(original)
        finally:
            self._restore(original)
        last = trials[-1]
        raise NoOpError(
            f"SSD found no `alpha_rel` that forgets within `max_drop` {self.max_drop:g}: at "
            f"{last['alpha_rel']:g} the validation accuracy is {last['forget']:.3f} on the forget "
            f"set (`target` {self.target:g}) and {last['retain']:.3f} on the retain set (before: "
            f"{start:.3f}); allow more, or use another method"
        )

    def _restore(self, original: dict[str, Tensor]) -> None:
        for name, parameter in self._weights().items():
            parameter.copy_(original[name])

    def _accuracy(self, role: Literal["forget", "retain"]) -> float:
        data: ForgetDataModule = self.data
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in data.loader(data.subset("val", role)):
            moved = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)}
            logits = cast(HasLogits, self.model.eval()).logits(moved)
            weight = moved["weight"].double()
            found[0] += ((logits.argmax(-1) == moved["label"]) * weight).sum()
            found[1] += weight.sum()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
        if not found[1]:
            raise ConfigurationError(
                f"`search` needs validation items, but there are none in the {role} set; set "
                "`search` to False"
            )
        return float(found[0] / found[1])

    def statistics(self) -> dict[str, Any]:
        """Threshold, selected share and change by layer, quantiles of the importance ratio."""
        return self._report


def _ratio(forget: Tensor, reference: Tensor) -> Tensor:
    """``I_f / I_D``; infinite where only the forget set matters, 0 where it does not."""
    return torch.where(forget > 0, forget / reference, torch.zeros_like(forget))


def _selected(forget: Tensor, reference: Tensor, threshold: float) -> Tensor:
    """Strictly above the threshold; a weight without importance for the forget set never is."""
    return (forget > threshold * reference) & (forget > 0)
