"""GS-LoRA++: GS-LoRA with class prototypes in feature space."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import ForgetDataModule
from mmforget.data.split import Role
from mmforget.errors import CapabilityError, ConfigurationError, ModelError, suggest
from mmforget.methods.base import joined, samples
from mmforget.methods.gs_lora import GSLoRA
from mmforget.models.base import HasHead, HasLogits, HasLoss, Model, Sites


class GSLoRAPlusPlus(GSLoRA):
    r"""GS-LoRA that pushes forgotten features away from, and holds others at, class prototypes.

    With the prototype ``p_c``, the mean feature of class ``c`` under the original model, and
    ``D(x) = KL(softmax(p_y) || softmax(h(x)))``, the loss of `GSLoRA` gains::

        w_forget * ReLU(prototype_bound - mean D(forget)) + w_retain * mean D(retain)

    Features are those of the images of a classifier, of the objects that a detector matches, and
    of the beginnings of the answers of a language model, whose classes are those of the data.
    Reads forget and retain inputs and labels; the prototypes take one pass over the training data
    before the first request and travel along the sequence. The prototype of a class is deleted once
    the class is forgotten; only one vector per class is kept. Classes without a sample have no
    prototype and no term.

    Differs from the released code: prototypes always come from the original model (theirs are
    recomputed from the current one, and in one script from a randomly initialised one);
    the reference must classify above chance; ``w_retain`` exists (theirs is 0 everywhere).

    Args:
        (all of `GSLoRA`, and)
        w_forget: weight of the push (paper: 3e-4 to 0.5, mostly 0.01).
        w_retain: weight of the pull.
        prototype_bound: divergence at which the push stops (paper: 18 or 50).
        reference: ``original`` keeps the prototypes of the first request; ``previous`` recomputes
            them from the model at the start of every request.
        prototype_data: ``all`` uses every training sample that is still there, ``buffer`` only the
            samples that the method trains on (few shots, fraction), ``head`` the row of the head
            that scores the class, without any data (the paper's choice for detectors).

    Raises:
        ModelError: the reference model does not classify better than chance, so that its features
            mean nothing (raised when training starts).

    Reference:
        Zhao, Fan, Ni, Wang, Chen, Meng, Zhang: Practical Continual Forgetting for Pre-trained
        Vision Models, T-PAMI 2026, arXiv 2501.09705.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasHead, Sites)
    access: ClassVar[DataAccess] = DataAccess(retain="full")

    prototypes: Tensor
    prototype_known: Tensor

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
        w_forget: float = 0.01,
        w_retain: float = 0.0,
        prototype_bound: float = 18.0,
        reference: Literal["original", "previous"] = "original",
        prototype_data: Literal["all", "buffer", "head"] = "all",
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
            rank=rank,
            lora_alpha=lora_alpha,
            beta=beta,
            bound=bound,
            hinge=hinge,
            sparsity=sparsity,
            sparsity_warmup=sparsity_warmup,
            proximal=proximal,
            group=group,
            norm=norm,
            target=target,
            init_a=init_a,
            zero_threshold=zero_threshold,
            drop_zero_groups=drop_zero_groups,
        )
        for name, value, valid in (
            ("reference", reference, ("original", "previous")),
            ("prototype_data", prototype_data, ("all", "buffer", "head")),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        self.w_forget, self.w_retain = w_forget, w_retain
        self.prototype_bound = prototype_bound
        self.reference, self.prototype_data = reference, prototype_data
        if not isinstance(getattr(self.model, "num_features", None), int):
            raise CapabilityError(
                f"GSLoRAPlusPlus needs features of instances, which {type(model).__name__} does "
                "not offer; use GSLoRA, which has no prototypes"
            )
        if prototype_data == "head":
            head_rows(self.model)  # refuses a head without one row per class
        if isinstance(self.model, HasLogits):
            self._make_room(self.model.num_classes)

    def _make_room(self, classes: int) -> None:
        """Room for the prototypes; a model without classes of its own has those of the data."""
        if not hasattr(self, "prototypes"):
            width = self.model.num_features
            self.register_buffer("prototypes", torch.zeros(classes, width))
            self.register_buffer("prototype_known", torch.zeros(classes, dtype=torch.bool))

    def bind(self, data: ForgetDataModule) -> None:
        """Connect the data, whose classes have the prototypes."""
        super().bind(data)
        self._make_room(data.num_classes)

    def on_fit_start(self) -> None:
        """Compute the prototypes unless an earlier request or a checkpoint brought them."""
        if not self.prototype_known.any():
            self.compute_prototypes()

    @torch.no_grad()
    def compute_prototypes(self) -> None:
        """Average the features of each class in one pass, in eval mode, adapters still neutral.

        With ``prototype_data="head"`` they are read off the head instead, without any data.

        Raises:
            ModelError: the model does not classify these samples better than chance.
        """
        if self.prototype_data == "head":
            self.prototypes.copy_(head_rows(self.model))
            self.prototype_known.fill_(True)
            return
        self.model.eval()
        classes, width = self.prototypes.shape
        device = self.prototypes.device
        total = torch.zeros(classes, width, dtype=torch.float64, device=device)
        count = torch.zeros(classes, dtype=torch.float64, device=device)
        correct = torch.zeros((), dtype=torch.float64, device=device)
        roles: tuple[Role, ...] = ("forget", "retain")
        for role in roles:
            dataset = self.data.subset("train", role, whole=self.prototype_data == "all")
            for batch in self.data.loader(dataset):
                batch = self.transfer_batch_to_device(batch, device, 0)
                seen = self.model.instances(batch)
                weight = batch["weight"].double()[seen.row]
                total.index_add_(0, seen.label, seen.features.double() * weight.unsqueeze(1))
                count.index_add_(0, seen.label, weight)
                correct += (seen.correct * weight).sum()
                self.spend(
                    forget=samples(batch) if role == "forget" else 0,
                    retain=samples(batch) if role == "retain" else 0,
                )
        if self.world_size > 1:  # the loader gives every process a part
            for value in (total, count, correct):
                torch.distributed.all_reduce(value)
        n, chance = float(count.sum()), 1 / classes
        accuracy = float(correct) / n
        # Three standard deviations of guessing: a random network does not pass by luck.
        if accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / n):
            raise ModelError(
                f"prototypes need a trained model, but the given one classifies {accuracy:.1%} of "
                f"its {n:.0f} training samples (chance is {chance:.1%}); load trained weights or "
                "use GSLoRA, which has no prototypes"
            )
        self.prototypes.copy_(total / count.clamp(min=1).unsqueeze(1))
        self.prototype_known.copy_(count > 0)

    def carry(self) -> dict[str, Tensor]:
        """The prototypes for the next request, without those of the classes just forgotten."""
        if self.reference == "previous":
            return {}
        known = self.prototype_known.cpu().clone()
        known[list(self.data.split.forget_classes)] = False  # type: ignore[union-attr]
        kept = torch.where(known.unsqueeze(1), self.prototypes.cpu(), 0.0)
        return {"prototypes": kept, "prototype_known": known}

    def inherit(self, state: dict[str, Tensor]) -> None:
        """Take over the prototypes of the original model."""
        if state:
            self._make_room(len(state["prototypes"]))
            self.prototypes.copy_(state["prototypes"])
            self.prototype_known.copy_(state["prototype_known"])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The terms of GS-LoRA and the two prototype terms, from one forward pass."""
        both, n = joined(batch)
        seen, weight = self.model.instances(both), both["weight"]
        terms = self.data_terms(seen.loss, weight, n)
        divergence = prototype_divergence(self.prototypes[seen.label], seen.features)
        known = weight[seen.row] * self.prototype_known[seen.label]
        gone = seen.row < n
        if self.w_forget:
            terms["prototype_forget"] = self.w_forget * self.bounded(
                divergence[gone], known[gone], self.prototype_bound
            )
        if self.w_retain:
            terms["prototype_retain"] = self.w_retain * self.global_mean(
                divergence[~gone], known[~gone]
            )
        return terms | self.penalty()


def head_rows(model: Any) -> Tensor:
    """The row of the head that scores each class, (C, d).

    Raises:
        CapabilityError: the head has not one row of the size of the features per class.
    """
    classes, width = getattr(model, "num_classes", 0), model.num_features
    found = [
        layer.weight[rows] for layer, rows in model.class_rows(range(classes))
        if layer.weight[rows].shape == (classes, width)
    ]  # fmt: skip
    if len(found) != 1:
        raise CapabilityError(
            f"`prototype_data` is 'head', but the head of {type(model).__name__} has not one row "
            f"of {width} numbers for each class; use 'all'"
        )
    return cast(Tensor, found[0].detach())


def prototype_divergence(prototypes: Tensor, features: Tensor) -> Tensor:
    """``KL(softmax(prototype) || softmax(feature))`` per sample, over the feature dimensions.

    Args:
        prototypes: (B, d) prototype of the class of each sample.
        features: (B, d) current features.

    Returns:
        (B,) values, at least 0, in nats.

    Example:
        >>> prototype_divergence(torch.zeros(1, 3), torch.zeros(1, 3))
        tensor([0.])
    """
    target = prototypes.float().log_softmax(1)
    current = features.float().log_softmax(1)
    return (target.exp() * (target - current)).sum(1)
