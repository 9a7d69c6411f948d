"""PERP: repair a pruned denoiser by training very few parameters, so that nothing comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.data.memorized import MemorizedSet
from mmforget.errors import CapabilityError, ConfigurationError, suggest
from mmforget.methods.base import OptimizerName
from mmforget.methods.memory_fine_tuning import MemoryFineTuning
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Model
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import generator

RetrainedPart = Literal["biases_and_norms", "biases", "norms", "lora"]


class PERP(MemoryFineTuning):
    """Parameter-efficient retraining after pruning: a mask takes weights out, few others learn.

    The weights of the mask are zero from the start and stay exactly zero: they get no gradient, and
    low-rank factors are masked before they are added. What is learnt are ordinary pictures, as in
    `RetainFineTuning`, so that damage by pruning heals without a look at the memories. Whether they
    come back all the same is for an attack to say.

    Args:
        model: the original model; one that is pruned by the same mask already will do, too.
        memorized, copy, seed: see `MemorizationMethod`.
        mask: what is taken out, from `SubspacePruning` and its like.
        retrain: which parameters learn: all ``biases``, the scales of all ``norms``, both, or
            ``lora``, low-rank factors of all linear layers of the denoiser.
        lora_rank: of the factors.
        lr, weight_decay, optimizer: see `MemoryFineTuning`.
        retain_batch_size, caption_dropout, clip, tolerance, check_every: see `MemoryFineTuning`.

    Raises:
        ConfigurationError: an unknown part, a rank below 1.
        CapabilityError: the denoiser has no such parameters.
        WeightsError: the mask was made for another model.

    Reference:
        M. Zimmer, M. Andoni, C. Spiegel, S. Pokutta: PERP: Rethinking the Prune-Retrain Paradigm in
        the Era of LLMs, 2023, arXiv 2312.15230.
    """

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        mask: WeightMask,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        retrain: RetrainedPart = "biases_and_norms",
        lora_rank: int = 4,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        retain_batch_size: int = 4,
        caption_dropout: float = 0.1,
        clip: float = 1.0,
        tolerance: float | None = 0.05,
        check_every: int = 100,
    ) -> None:
        if retrain not in get_args(RetrainedPart):
            raise ConfigurationError(
                f"`retrain` is '{retrain}', {suggest(retrain, get_args(RetrainedPart))}"
            )
        at_least_one(lora_rank=lora_rank)
        self.mask, self.retrain, self.lora_rank = mask, retrain, lora_rank
        self._hooks: list[Any] = []
        super().__init__(
            model,
            memorized,
            copy=copy,
            seed=seed,
            lr=lr,
            weight_decay=weight_decay,
            optimizer=optimizer,
            retain_batch_size=retain_batch_size,
            caption_dropout=caption_dropout,
            clip=clip,
            tolerance=tolerance,
            check_every=check_every,
        )
        self._names += [name for name in mask.masks if name not in self._names]
        if retrain == "lora":
            self.trained_parameters = sum(p.numel() for p in self.factors.parameters())
            adapted = [f"{name}.weight" for name in self._layers]
            self._names += [name for name in adapted if name not in self._names]

    # ---- weights --------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """Prune, and choose what learns."""
        network = self.model.network
        self._prune()
        if self.retrain == "lora":
            self._attach()
            return []
        found = [
            (name, parameter)
            for name, parameter in network.named_parameters()
            if self._learns(name, parameter)
        ]
        if not found:
            raise CapabilityError(
                f"{type(network).__name__} has no {self.retrain.replace('_', ' ')} to retrain; use "
                "retrain='lora'"
            )
        for name, parameter in found:
            chosen = self.mask.masks.get(name)
            if chosen is not None:
                # A zero that gets no gradient stays zero under every optimizer and decay.
                self._hooks.append(parameter.requires_grad_(True).register_hook(_without(chosen)))
        return [parameter for _, parameter in found]

    def _prune(self) -> None:
        network = self.model.network
        parameters = dict(network.named_parameters())
        pruned = all(
            name in parameters
            and parameters[name].shape == chosen.shape
            and not parameters[name].detach().cpu()[chosen].any()
            for name, chosen in self.mask.masks.items()
        )
        self.mask.apply(self.model, check_base=not pruned)

    def _learns(self, name: str, parameter: nn.Parameter) -> bool:
        kind = name.rpartition(".")[2]
        if kind == "bias":
            return self.retrain != "norms"
        return kind == "weight" and parameter.ndim == 1 and self.retrain != "biases"

    # ---- low rank -------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Add masked low-rank factors to every linear layer, beside the weights."""
        self._layers = [
            name
            for name, module in self.model.network.named_modules()
            if isinstance(module, nn.Linear)
        ]
        factors = []
        for name in self._layers:
            weight = self.model.network.get_submodule(name).weight
            draw = generator(self.seed, "perp", name)
            down = torch.randn((self.lora_rank, weight.shape[1]), generator=draw)
            up = torch.zeros(weight.shape[0], self.lora_rank)
            factors += [up.to(weight.device), down.to(weight.device) / weight.shape[1] ** 0.5]
        self.factors = nn.ParameterList(factors)
        for number, name in enumerate(self._layers):
            module = self.model.network.get_submodule(name)

            def add(_: nn.Module, inputs: Any, output: Tensor, number: int = number) -> Tensor:
                change = self._change(number).to(inputs[0])
                return output + F.linear(inputs[0], change)

            self._hooks.append(module.register_forward_hook(add))

    def _change(self, number: int) -> Tensor:
        chosen = self.mask.masks.get(f"{self._layers[number]}.weight")
        change: Tensor = self.factors[2 * number] @ self.factors[2 * number + 1]
        return change if chosen is None else change.masked_fill(chosen.to(change.device), 0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, for the optimizer."""
        if self.retrain != "lora":
            return super().parameter_groups()
        return [{"params": list(self.factors.parameters()), "weight_decay": self.weight_decay}]

    @torch.no_grad()
    def edit(self) -> None:
        """Merge low-rank factors, if there are any, and take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.retrain == "lora":
            for number, name in enumerate(self._layers):
                weight = self.model.network.get_submodule(name).weight
                weight.copy_(weight + self._change(number).to(weight))
        super().edit()

    def statistics(self) -> dict[str, Any]:
        """What was taken out, and what was trained."""
        return super().statistics() | {
            "retrain": self.retrain,
            "lora_rank": self.lora_rank if self.retrain == "lora" else None,
            "removed": self.mask.count,
        }


def _without(chosen: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that takes the gradient of chosen entries away."""
    return lambda gradient: gradient.masked_fill(chosen.to(gradient.device), 0)
