"""GS-LoRA: class forgetting with group-sparse low-rank adapters in the feed-forward layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.base import GradientMethod, joined
from mmforget.methods.low_rank import ADAPTER, LowRankAdapters, TrainedCheckpoint
from mmforget.models.base import HasHead, HasLoss, LossParts, Model, Site, Sites


class GSLoRA(TrainedCheckpoint, GradientMethod):
    r"""Bounded forgetting in low-rank adapters of the feed-forward layers, group by group.

    Everything of the model is frozen, the head included, so that forgetting happens in the
    features. Each block's adapters form one group of a group lasso::

        L = CE(retain) + beta * ReLU(bound - CE(forget)) + sparsity * sum_g ||theta_g||_2

    with ``theta_g`` the concatenation of all ``A`` and ``B`` of the group. Where the loss has parts
    that are no recognition, such as the boxes of a detector, only the recognition of forget samples
    is reversed and bounded; the rest is learnt on, times ``beta``. Reads forget inputs and labels,
    and a part of the retain data. The adapters are merged by `finalize`; `save_adapter`
    writes those of this request by themselves, in the format of peft.

    Differs from the released code: groups come from the module tree; the hinge bound follows the
    number of classes for a softmax head (``105``, theirs, never closes there); the penalty has a
    finite gradient at zero; the warm-up of the sparsity weight is not restricted to one script;
    ``proximal`` produces groups that are exactly zero, which gradient steps never do.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer, freeze_bn: see `GradientMethod`.
        rank: rank of the adapters (paper: 8).
        lora_alpha: the scale of the adapters is ``lora_alpha / rank`` (paper: 1).
        beta: weight of the forget term (paper: 0.05 to 0.4).
        bound: recognition loss at which the forget term stops; ``auto`` is ``2 ln C`` for a
            classifier, twice the loss of a uniform prediction over ``C`` classes, 15 for a
            detector (paper), and ``ln V`` per token for a language model of ``V`` tokens. Use 105
            for a cosine-margin head.
        hinge: ``batch`` stops when the mean loss reaches the bound, ``sample`` stops each sample.
        sparsity: weight of the group lasso after its warm-up (paper: 1e-4 to 0.015).
        sparsity_warmup: number of first epochs with weight 0.
        proximal: shrink the groups after each optimizer step instead of penalising them:
            ``theta_g *= max(0, 1 - lr * sparsity / ||theta_g||)``. Exempts them from weight decay.
            Adam's steps do not shrink with the gradient, so useful values of `sparsity` are of the
            order of 1 to 100 here.
        group: ``block``; ``lora`` makes each adapter a group, ``matrix`` each factor.
        norm: ``joint`` is the root above; ``separate`` sums the norms of the factors of a group.
        target: which layers get adapters (``attention`` is an ablation).
        init_a: ``a`` of the Kaiming-uniform initialisation of ``A``; ``B`` starts at zero.
        zero_threshold: a group counts as zero when ``||s B A|| / ||W||`` over it is below.
        drop_zero_groups: leave groups that count as zero out of the merge.

    Raises:
        CapabilityError: the model has no feed-forward layers, head or loss.

    Reference:
        Zhao, Ni, Fan, Wang, Chen, Meng, Zhang: Continual Forgetting for Pre-trained Vision Models,
        CVPR 2024, arXiv 2403.11530.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasHead, Sites)
    access: ClassVar[DataAccess] = DataAccess(retain="fraction")
    saves_adapter: ClassVar[bool] = True

    group_norms: Tensor
    hinge_open: Tensor

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-2,
        lr_min: float = 1e-5,
        weight_decay: float = 0.05,
        optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
        freeze_bn: bool = True,
        rank: int = 8,
        lora_alpha: float = 1.0,
        beta: float = 0.2,
        bound: float | Literal["auto"] = "auto",
        hinge: Literal["batch", "sample"] = "batch",
        sparsity: float = 1e-4,
        sparsity_warmup: int = 0,
        proximal: bool = False,
        group: Literal["block", "lora", "matrix"] = "block",
        norm: Literal["joint", "separate"] = "joint",
        target: Literal["ffn", "attention"] = "ffn",
        init_a: float = math.sqrt(5),
        zero_threshold: float = 1e-4,
        drop_zero_groups: bool = False,
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
        for name, value, valid in (
            ("hinge", hinge, ("batch", "sample")),
            ("group", group, ("block", "lora", "matrix")),
            ("norm", norm, ("joint", "separate")),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        if not beta > 0:
            raise ConfigurationError(f"`beta` is {beta}, it must be positive")
        self.beta, self.hinge = beta, hinge
        self.bound = float(self.model.forget_bound if bound == "auto" else bound)
        self.sparsity, self.sparsity_warmup = sparsity, sparsity_warmup
        self.proximal, self.grouping, self.norm = proximal, group, norm
        self.zero_threshold, self.drop_zero_groups = zero_threshold, drop_zero_groups
        self.base_parameters = sum(p.numel() for p in self.model.parameters())
        self.adapted: list[Site] = self.model.sites(target)
        self.model.requires_grad_(False)
        self.adapters = LowRankAdapters(
            self.model.network, self.adapted, rank, lora_alpha, seed, init_a
        )
        self.groups = self._make_groups()
        self.register_buffer("group_norms", torch.zeros(len(self.groups)))
        self.register_buffer("hinge_open", torch.zeros(2))  # steps with an open hinge, all steps
        self._report: dict[str, Any] = {}

    # ---- adapters -------------------------------------------------------------------------------

    def layer(self, site: Site) -> nn.Module:
        """The adapted layer at a site."""
        return self.adapters.layer(site)

    def factors(self, site: Site) -> tuple[nn.Parameter, nn.Parameter]:
        """The trainable factors ``A`` (rank, in) and ``B`` (out, rank) at a site."""
        return self.adapters.factors(site)

    def _make_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for site in self.adapted:
            a, b = self.factors(site)
            if self.grouping == "matrix":
                groups[f"{site.name}.A"], groups[f"{site.name}.B"] = [a], [b]
            else:
                key = site.block if self.grouping == "block" else site.name
                groups.setdefault(key, []).extend((a, b))
        return groups

    # ---- objective ------------------------------------------------------------------------------

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """One forward pass over both streams: retain loss, bounded forget loss, sparsity."""
        both, n_forget = joined(batch)
        loss = self.model.loss_parts(both)
        return self.data_terms(loss, both["weight"], n_forget) | self.penalty()

    def data_terms(self, loss: LossParts, weight: Tensor, n_forget: int) -> dict[str, Tensor]:
        """Retain loss and hinge on the forget loss, from per-sample losses of both streams."""
        recognition, gone = loss.recognition[:n_forget], weight[:n_forget]
        terms = {
            "retain": self.global_mean(loss.total[n_forget:], weight[n_forget:]),
            "forget": self.beta * self.bounded(recognition, gone, self.bound, record=True),
        }
        if loss.rest is not None:
            terms["forget_rest"] = self.beta * self.global_mean(loss.rest[:n_forget], gone)
        return terms

    def bounded(self, values: Tensor, weight: Tensor, bound: float, record: bool = False) -> Tensor:
        """``ReLU(bound - mean(values))``, or the mean of the hinges with ``hinge="sample"``."""
        if self.hinge == "sample":
            hinge = self.global_mean((bound - values).relu(), weight)
            open_ = self.global_value(hinge) > 0
        else:
            mean = self.global_mean(values, weight)
            # The hinge is decided on the mean over all processes, so that they agree.
            open_ = self.global_value(mean) < bound
            hinge = torch.where(open_, bound - mean, torch.zeros_like(mean))
        if record:
            self.hinge_open += torch.stack([open_.float(), torch.ones_like(open_.float())])
        return hinge

    def current_sparsity(self) -> float:
        """The weight of the sparsity term in this epoch."""
        return 0.0 if self.current_epoch < self.sparsity_warmup else self.sparsity

    def penalty(self) -> dict[str, Tensor]:
        """The group lasso; nothing in proximal mode or during the warm-up."""
        weight = self.current_sparsity()
        if self.proximal or weight == 0:
            return {}
        return {"sparsity": weight * self.structure()}

    def structure(self) -> Tensor:
        """Sum of the group norms, in fp32; the gradient at a zero group is zero."""
        norms = []
        for members in self.groups.values():
            if self.norm == "joint":
                norms.append(torch.linalg.vector_norm(_flat(members)))
            else:
                norms.extend(torch.linalg.vector_norm(p.float()) for p in members)
        return torch.stack(norms).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then in proximal mode apply the proximal operator of the group lasso."""
        super().optimizer_step(*args, **kwargs)
        weight = self.current_sparsity()
        if self.proximal and weight:
            # Here and not at the end of the batch: the schedule has not changed the rate yet.
            self.shrink(self.trainer.optimizers[0].param_groups[0]["lr"] * weight)

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """Apply the proximal operator of ``threshold * sum of group norms`` to the adapters."""
        for members in self.groups.values():
            factor = proximal_factor(torch.linalg.vector_norm(_flat(members)), threshold)
            for parameter in members:
                parameter.mul_(factor.to(parameter.dtype))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapters; without weight decay in proximal mode, which shrinks them itself."""
        decay = 0.0 if self.proximal else self.weight_decay
        return [{"params": [p for m in self.groups.values() for p in m], "weight_decay": decay}]

    # ---- the end ------------------------------------------------------------------------------

    @torch.no_grad()
    def edit(self) -> None:
        """Measure the groups, keep the adapters of this request, merge."""
        changes = self.group_changes()
        if self.drop_zero_groups:
            for site in self.adapted:
                if changes[site.block] < self.zero_threshold:
                    self.factors(site)[1].zero_()
        self._report = self._measure(changes)
        self.adapters.merge()

    def restore(self) -> Model:
        """Give back the model bit by bit: the untouched original, or without its adapters."""
        if self.copied or self.adapters.merged:
            return super().restore()
        self.adapters.unload()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return self.model

    @torch.no_grad()
    def group_changes(self) -> dict[str, float]:
        """Relative effective change ``||s B A||_F / ||W||_F`` of every block."""
        change: dict[str, float] = {}
        base: dict[str, float] = {}
        for site in self.adapted:
            layer: Any = self.layer(site)
            delta = layer.get_delta_weight(ADAPTER).float()
            weight = layer.get_base_layer().weight.float()
            change[site.block] = change.get(site.block, 0.0) + float(delta.square().sum())
            base[site.block] = base.get(site.block, 0.0) + float(weight.square().sum())
        return {
            block: math.sqrt(change[block]) / max(math.sqrt(base[block]), 1e-12) for block in change
        }

    def _measure(self, changes: dict[str, float]) -> dict[str, Any]:
        zero = [block for block, change in changes.items() if change < self.zero_threshold]
        exact = [n for n, members in self.groups.items() if not any(p.any() for p in members)]
        trained = sum(p.numel() for members in self.groups.values() for p in members)
        changed = sum(
            self.layer(site).get_base_layer().weight.numel()  # type: ignore[operator]
            for site in self.adapted
            if self.factors(site)[0].any() and self.factors(site)[1].any()
        )
        return {
            "trainable_parameters": trained,
            "trainable_ratio": trained / self.base_parameters,
            "changed_weight_ratio": changed / self.base_parameters,
            "groups": len(self.groups),
            "zero_groups": len(zero),
            "zero_group_ratio": len(zero) / len(changes),
            "exactly_zero_groups": len(exact),
            "group_change": changes,
            "group_norm": {
                name: float(torch.linalg.vector_norm(_flat(members)))
                for name, members in self.groups.items()
            },
            "hinge_bound": self.bound,
            "hinge_open_share": float(self.hinge_open[0] / self.hinge_open[1].clamp(min=1)),
        }

    def statistics(self) -> dict[str, Any]:
        """Adapter size, zero groups, change per group and the share of steps with open hinge."""
        return self._report

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters of this request as a peft adapter folder. After `finalize`.

        Raises:
            ConfigurationError: `finalize` has not run yet.
        """
        self.adapters.save(folder)


def proximal_factor(norm: Tensor, threshold: float) -> Tensor:
    """Factor by which the proximal operator of ``threshold * ||.||`` shrinks a group.

    Args:
        norm: scalar norm of the group.
        threshold: step size times weight.

    Returns:
        Scalar ``max(0, 1 - threshold / norm)``, 0 for a group that is zero already.

    Example:
        >>> proximal_factor(torch.tensor(2.0), 0.5)
        tensor(0.7500)
    """
    return (1 - threshold / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)


def _flat(members: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.reshape(-1).float() for p in members])
