"""RMU: misdirect the hidden states of what is to be forgotten at one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.answer_losses import SequenceNorm, state_distance
from mmforget.methods.answer_unlearning import AnswerUnlearning, DecoupleWeight, Heard
from mmforget.methods.base import OptimizerName
from mmforget.models.base import Answers, Batch, HasLoss, Model, Sites
from mmforget.models.multimodal import AnswerLogits
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.seeds import generator


class RMU(AnswerUnlearning):
    r"""Representation misdirection: forgotten states move to one random direction, others stay.

    ::

        L = |h(forget) - coefficient * u|^2 + retain_weight * |h(retain) - h_original(retain)|^2

    with ``h`` the output of one layer of the language model at the places from which the tokens of
    an answer are predicted, squares averaged over the width and these places, and ``u`` a unit
    vector that is drawn once. (Published code takes the states of the answer's own tokens; the
    first of them, which here is the name, is predicted from the last token of the question, which
    that leaves alone.) Only the last feed-forward projections of this layer and of the two before
    it are trained, and nothing else. Reads forget inputs and labels and a part of the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        seq_norm: see `AnswerUnlearning`.
        layer: number of the layer, from 0, negative from the end; None takes the middle one.
        coefficient: length of the state that is aimed at. Choose it several times as long as the
            states of that layer (released code: 6.5 and 20 for models of 7 billion weights).
        weights: ``down`` trains the projections named above, ``layers`` everything in these layers.
        retain_weight: ``auto`` is 1 (released code: 1200, with states of other sizes).
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.

    Raises:
        CapabilityError: the model answers no questions or has no feed-forward layers.
        ConfigurationError: no such layer, or a setting out of range.

    Reference:
        N. Li et al.: The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning,
        ICML 2024, arXiv 2403.03218.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, Answers, Sites)

    direction: Tensor

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        layer: int | None = None,
        coefficient: float = 20.0,
        weights: Literal["down", "layers"] = "down",
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        seq_norm: SequenceNorm = "batch_token",
    ) -> None:
        if weights not in ("down", "layers"):
            raise ConfigurationError(
                f"`weights` is '{weights}', {suggest(weights, ('down', 'layers'))}"
            )
        if not coefficient > 0:
            raise ConfigurationError(f"`coefficient` is {coefficient}, it must be positive")
        self._layer, self.weights = layer, weights
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
            retain_weight=retain_weight,
            decouple_weight=decouple_weight,
            seq_norm=seq_norm,
        )
        self.coefficient = coefficient
        width = self._written[-1].module.weight.shape[0]
        # A buffer, so that it moves with the model and a resumed run has the same.
        drawn = torch.randn(width, generator=generator(seed, "direction"))
        self.register_buffer("direction", drawn / drawn.norm())

    def _prepare(self, *_: Any) -> None:
        """Choose the layer, and freeze all but the weights that are trained."""
        # The last feed-forward layer of a block writes its result.
        last = {site.block: site for site in self.model.sites("ffn")}
        number = len(last) // 2 if self._layer is None else self._layer
        if not -len(last) <= number < len(last):
            raise ConfigurationError(
                f"`layer` is {number}, but there are {len(last)} layers; give a number from 0 to "
                f"{len(last) - 1}, or a negative one from the end"
            )
        number %= len(last)
        self._written: list[Any] = list(last.values())[max(0, number - 2) : number + 1]
        self.block = self._written[-1].block
        network = self.model.network.requires_grad_(False)
        for site in self._written:
            trained = site.module if self.weights == "down" else network.get_submodule(site.block)
            trained.requires_grad_(True)

    @property
    def referred(self) -> frozenset[str]:
        """The retain stream, for its original states."""
        return frozenset({"retain"} if self.retain != "none" else ())

    def said(self, streams: Mapping[str, Batch]) -> dict[str, AnswerLogits]:
        """What the model says, with the states of the layer as ``hidden``."""
        with self._watched() as seen:
            found = super().said(streams)
        return with_states(found, seen[-1])

    def original(self, streams: Mapping[str, Batch]) -> dict[str, AnswerLogits]:
        """What the original model says, with the states of the layer as ``hidden``."""
        with self._watched() as seen:
            found = super().original(streams)
        return with_states(found, seen[-1])

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """Collect the output of the layer at every forward pass."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = self.model.network.get_submodule(self.block).register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The distance of the states from the direction."""
        forget = heard["forget"]
        wanted = self.coefficient * self.direction
        apart = state_distance(forget.found.hidden, wanted, forget.found.labels)
        return self.mean(apart, forget.weight)

    def retain_term(self, retain: Heard) -> Tensor:
        """The distance of the states from those of the original."""
        before = cast(AnswerLogits, retain.before)
        wanted = before.hidden[before.labels != IGNORED]
        return self.mean(state_distance(retain.found.hidden, wanted, retain.found.labels),
                         retain.weight)  # fmt: skip

    def statistics(self) -> dict[str, Any]:
        """The layer, and the trained weights by part of the network."""
        return super().statistics() | {"layer": self.block}


def with_states(found: Mapping[str, AnswerLogits], states: Tensor) -> dict[str, AnswerLogits]:
    """Replace ``hidden`` by the states of another layer, from which the same labels are predicted.

    Args:
        found: by stream, with (B, K) labels of the last K places; a label is predicted one place
            before its own.
        states: (sum of all B, L, D) of whole rows.
    """
    parts, start = {}, 0
    for name, one in found.items():
        rows = slice(start, start := start + len(one.labels))
        length = one.labels.shape[1]
        parts[name] = one._replace(hidden=states[rows, -length - 1 : -1])
    return parts
