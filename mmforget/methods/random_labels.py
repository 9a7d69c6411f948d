"""RandomLabels: learn wrong labels for the forget set, and go on learning the retain set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.hashing import uniform
from mmforget.errors import ConfigurationError, RequestError
from mmforget.methods.base import GradientMethod, OptimizerName, joined
from mmforget.models.base import HasLogits, HasLoss, Model


class RandomLabels(GradientMethod):
    """Minimises ``L(retain) + forget_weight * L(forget with random labels)``, all weights trained.

    Labels, also those of the objects in an image, are drawn by (seed, sample id, epoch), so they
    depend neither on the loader nor on the number of processes. Both streams go through one forward
    pass. Reads forget and retain inputs and labels.

    Published variants differ in what may be drawn, and rarely say so: here a label is never one of
    a forgotten class, and never the true one (with ``exclude_true=False``: uniform over all
    classes, as in SalUn's code).

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer, freeze_bn: see `GradientMethod`.
        exclude_true: see above.
        resample: draw new labels in every epoch; False keeps those of the first.
        forget_weight: weight of the forget term, positive. Papers use 1; labels that change with
            every epoch then cost retain accuracy (some 2 points in the digit world).

    Raises:
        RequestError: no label is left to draw from (in the first step).

    Reference:
        L. Graves, V. Nagisetty, V. Ganesh: Amnesiac Machine Learning, AAAI 2021, arXiv 2010.10981.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasLogits)
    access: ClassVar[DataAccess] = DataAccess()

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 3e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        freeze_bn: bool = True,
        exclude_true: bool = True,
        resample: bool = True,
        forget_weight: float = 0.1,
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
        if not forget_weight > 0:
            raise ConfigurationError(f"`forget_weight` is {forget_weight}, it must be positive")
        self.exclude_true, self.resample = exclude_true, resample
        self.forget_weight = forget_weight

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Loss for the true labels of retained and for random labels of forgotten samples."""
        both, n_forget = joined(batch)
        label = both["label"].clone()
        label[:n_forget] = self.draw(both["id"][:n_forget], label[:n_forget])
        loss, weight = self.model.loss(both | {"label": label}), both["weight"]
        return {
            "retain": self.global_mean(loss[n_forget:], weight[n_forget:]),
            "forget": self.forget_weight * self.global_mean(loss[:n_forget], weight[:n_forget]),
        }

    def draw(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Random labels of the current epoch.

        Args:
            ids: (B,) sample ids.
            labels: (B,) true labels, or (B, K) of objects, negative where there is none.

        Returns:
            As `labels`, int64 class indices on its device; what was negative stays so.

        Raises:
            RequestError: fewer than two labels are left to draw from.
        """
        if labels.ndim == 2:  # every object of an image gets a label of its own
            columns = [self._draw(ids, column, (place,)) for place, column in enumerate(labels.T)]
            return torch.where(labels < 0, labels, torch.stack(columns, dim=1))
        return self._draw(ids, labels, ())

    def _draw(self, ids: Tensor, labels: Tensor, place: tuple[int, ...]) -> Tensor:
        epoch = self.current_epoch if self.resample else 0
        chance = uniform(ids.cpu().numpy(), self.seed, "random-label", epoch, *place)
        true = labels.cpu().numpy()
        if self.exclude_true:
            drawn = draw_other(chance, true, self._allowed())
        else:
            drawn = (chance * self.model.num_classes).astype(np.int64)
        return torch.from_numpy(drawn).to(labels)

    def _allowed(self) -> np.ndarray:
        split = self.data.split
        if split is None:
            raise ConfigurationError(
                f"{type(self).__name__} needs a request; call `datamodule.request(...)` first"
            )
        return np.asarray(split.retain_classes, dtype=np.int64)


def draw_other(chance: np.ndarray, true: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Turn uniform numbers into labels from a list, none of them the true one.

    Args:
        chance: (B,) uniform in [0, 1).
        true: (B,) true labels, in the list or not.
        allowed: (K,) ascending class indices.

    Raises:
        RequestError: nothing is left to draw from.

    Example:
        >>> draw_other(np.array([0.0, 0.9]), np.array([1, 7]), np.array([1, 4]))
        array([4, 4])
    """
    inside = np.isin(true, allowed)
    choices = len(allowed) - inside.astype(np.int64)
    if (choices < 1).any():
        raise RequestError(
            "RandomLabels has no wrong label to give, since only one class is not forgotten; "
            "set `exclude_true` to False or forget fewer classes"
        )
    drawn = (chance * choices).astype(np.int64)
    drawn += inside & (drawn >= np.searchsorted(allowed, true))
    return allowed[drawn]
