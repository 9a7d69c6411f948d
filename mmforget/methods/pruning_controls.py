"""Controls of pruning: as many weights as a given mask takes out, chosen without its knowledge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmforget.data.memorized import MemorizedSet
from mmforget.errors import WeightsError
from mmforget.methods.activation_statistics import check_first_steps, collect
from mmforget.methods.pruning import PruningMethod, base_prompts
from mmforget.models.base import Model
from mmforget.models.memory_layers import MemoryLayer
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import generator


class LikePruning(PruningMethod):
    """Base of the controls: choose what a mask chooses, so many, but by other scores.

    A mask of single weights gives as many weights in every row; one of whole columns or rows gives
    as many whole columns or rows in every layer.

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`. The prompts are not read.
        like: the mask whose counts are matched, located in this model.

    Raises:
        WeightsError: a mask of another network.
    """

    control: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        like: WeightMask,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(model, memorized, copy=copy, seed=seed)
        if like.component != self.model.component:
            raise WeightsError(
                f"`like` is a mask of the {like.component}, the model has a "
                f"{self.model.component}; give a mask that was located in this model"
            )
        like.check_base(self.model.network)
        self.like = like

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the mask."""
        return {"like": self.like.metadata.get("method"), "unit": self.like.unit}

    @abstractmethod
    def scores(self, name: str, weight: Tensor) -> Tensor:
        """How much one wants each weight: (out, width), 0 or more.

        Args:
            name: of the parameter.
            weight: (out, width) in single precision, the columns that can be chosen.
        """

    def locate(self) -> WeightMask:
        """Take the largest scores, as many as the given mask has."""
        masks: dict[str, Tensor] = {}
        unit, chosen_rows = self.like.unit, dict[str, Tensor]()
        for name, given in self.like.masks.items():
            if given.ndim != 2:
                continue
            columns = self.like.columns(name)
            part = given[:, columns]
            weight = self.model.network.get_parameter(name).detach()[:, columns].float()
            found = self.scores(name, weight).cpu()
            if unit == "column":
                chosen = _largest(found.norm(dim=0)[None], part.any(0).sum()[None])
            elif unit == "row":
                chosen = _largest(found.norm(dim=1)[None], part.any(1).sum()[None]).T
                chosen_rows[name.removesuffix(".weight")] = chosen[:, 0]
            else:
                chosen = _largest(found, part.sum(1))
            mask = torch.zeros_like(given)
            mask[:, columns] = chosen.expand_as(part)
            masks[name] = mask
        for name, given in self.like.masks.items():
            if given.ndim != 2:
                # The bias of an output that is taken out goes with it, and no other does.
                masks[name] = chosen_rows[name.removesuffix(".bias")].reshape(given.shape)
        facts = {"columns": self.like.metadata["columns"]} if self._has_columns else {}
        return self.described(masks, unit=unit, **facts)

    @property
    def _has_columns(self) -> bool:
        return "columns" in self.like.metadata


def _largest(scores: Tensor, counts: Tensor) -> Tensor:
    """(rows, n) bool: in every row its `counts` (rows,) largest scores."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < counts[:, None]


class RandomPruning(LikePruning):
    """Control: as many weights as a mask takes out, drawn evenly.

    Args:
        model, memorized, like, copy, seed: see `LikePruning`. The seed decides the draw.
    """

    def scores(self, name: str, weight: Tensor) -> Tensor:
        """Random numbers."""
        return torch.rand(weight.shape, generator=generator(self.seed, "random pruning", name))


class MagnitudePruning(LikePruning):
    """Control: as many weights as a mask takes out, those of the largest magnitude.

    Args:
        model, memorized, like, copy, seed: see `LikePruning`.
    """

    def scores(self, name: str, weight: Tensor) -> Tensor:
        """Magnitudes."""
        return weight.abs()


class BaseOnlyPruning(LikePruning):
    """Control: as many weights as a mask takes out, those that base prompts use most.

    The score is ``|W_ij| a_j`` with the activations of prompts that are not memorized, see
    `SubspacePruning`. If this does as well, the memorized prompts were not needed.

    Args:
        model, memorized, like, copy, seed: see `LikePruning`.
        base: prompts that are not memorized; None takes the empty prompt, once per memorized one.
        first_steps: number of sampling steps that are looked at; None takes what the mask was
            located with, or all.
        steps, guidance: of sampling; None takes the model's.
        batch_size: pictures at a time.

    Raises:
        RequestError: a base prompt that is memorized.
    """

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        like: WeightMask,
        base: Sequence[str] | None = None,
        first_steps: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 32,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        given = base_prompts(memorized, base)
        super().__init__(model, memorized, like, copy=copy, seed=seed)
        self.base = given if given is not None else ("",) * len(memorized)
        if first_steps is None:
            first_steps = like.metadata.get("settings", {}).get("first_steps")
        self.first_steps, self.steps, self.guidance = first_steps, steps, guidance
        self.batch_size = batch_size
        self.model.check_length(self.base)
        check_first_steps(first_steps, self.model.steps if steps is None else steps)
        self._sizes: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the mask."""
        return super().settings() | {
            "base": list(self.base),
            "first_steps": self.first_steps,
            "steps": self.steps,
            "guidance": self.guidance,
        }

    def locate(self) -> WeightMask:
        """Collect statistics of the base prompts, and choose."""
        layers = []
        for name, mask in self.like.masks.items():
            if mask.ndim == 2:
                path, rows = name.removesuffix(".weight"), slice(0, len(mask))
                module = self.model.network.get_submodule(path)
                layers.append(MemoryLayer(path, module, self.like.columns(name), rows))
        found = collect(
            self.model,
            self.base,
            layers,
            steps=self.steps,
            guidance=self.guidance,
            first_steps=self.first_steps,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        self.spend(retain=found.passes)
        self._sizes = {
            layer.weight_name: found.mean_square(layer.name, found.times).sqrt() for layer in layers
        }
        return super().locate()

    def scores(self, name: str, weight: Tensor) -> Tensor:
        """Magnitudes times activations of the base prompts."""
        return weight.abs() * self._sizes[name].to(weight)
