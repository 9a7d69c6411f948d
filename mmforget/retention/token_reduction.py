"""What all ways to spare visual tokens have in common: a budget, a context, a record of it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from mmforget.errors import ConfigurationError, suggest
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import Inputs, unwrapped
from mmforget.retention.token_budget import TokenBudget

Pictures = Sequence[Sequence[Tensor]]
"""Per row of a batch its pictures, uint8 (3, H, W)."""

TOKEN_REDUCERS: Mapping[str, tuple[str, str]] = {
    "fast_v": ("mmforget.retention.fast_v", "FastV"),
    "vision_zip": ("mmforget.retention.vision_zip", "VisionZip"),
    "random": ("mmforget.retention.token_baselines", "random_tokens"),
    "grid": ("mmforget.retention.token_baselines", "grid_tokens"),
    "pooling": ("mmforget.retention.token_pooling", "PooledTokens"),
    "chosen": ("mmforget.retention.visual_features", "ChosenTokens"),
    "random_inside": ("mmforget.retention.token_baselines", "random_inside"),
    "grid_inside": ("mmforget.retention.token_baselines", "grid_inside"),
    "chosen_inside": ("mmforget.retention.token_pruning", "TokenPruner"),
}
"""Every way to spare visual tokens, by name: module and class or function. Those that end in
``inside``, and ``fast_v``, drop tokens between decoder layers; all others before the first one. The
two ``chosen`` want a `scorer`, for example one that knows where the objects are."""


def token_reducer(
    name: str,
    keep_tokens: int | Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] | None = None,
    **settings: Any,
) -> TokenReducer:
    """Build one of `TOKEN_REDUCERS`, so that all can be compared at equal budgets.

    ::

        for name in ("fast_v", "vision_zip", "random", "grid", "pooling"):
            with token_reducer(name, keep_tokens=16).on(model):
                answers = model.answer(images, questions)

    Args:
        name: one of `TOKEN_REDUCERS`.
        keep_tokens: see `TokenBudget`.
        keep_ratio: see `TokenBudget`.
        **settings: further arguments of the class.

    Raises:
        ConfigurationError: an unknown name, or a budget out of range.
    """
    if name not in TOKEN_REDUCERS:
        raise ConfigurationError(f"there is no reducer '{name}'; {suggest(name, TOKEN_REDUCERS)}")
    module, attribute = TOKEN_REDUCERS[name]
    build = getattr(importlib.import_module(module), attribute)
    made: TokenReducer = build(keep_tokens=keep_tokens, keep_ratio=keep_ratio, **settings)
    return made


@dataclass(frozen=True)
class PictureTokens:
    """The visual tokens of one picture, as a scorer sees them.

    Attributes:
        features: (N, D) after the projector; between decoder layers the hidden states there.
        keep: how many will stay.
        grid: (h, w) of the tokens, None where they form no grid or it is not known.
        row: row of the batch.
        number: of the picture within its row.
        attention: (N,) attention that the tokens receive, for methods that ask for it.
        keys: (N, d) what the tokens say of themselves in the vision tower, likewise.
        image: uint8 (3, H, W), where the caller gave the pictures and none is cut into tiles.
    """

    features: Tensor
    keep: int
    grid: tuple[int, int] | None
    row: int
    number: int
    attention: Tensor | None = None
    keys: Tensor | None = None
    image: Tensor | None = None


TokenScorer = Callable[[PictureTokens], Tensor]
"""Scores (N,) of the tokens of a picture; the highest stay."""


@dataclass(frozen=True)
class KeptTokens:
    """What was left of the visual tokens of a batch.

    Attributes:
        places: per row and picture the ascending places (k,) of the tokens that stay; None for a
            row without pictures.
        given: per row and picture how many tokens there were.
        merged: whether tokens that stay may hold more than their own place.
    """

    places: list[list[Tensor] | None]
    given: list[list[int] | None]
    merged: bool = False

    @property
    def counts(self) -> list[int | None]:
        """Tokens that stay in each row; None without pictures."""
        return [None if row is None else sum(len(one) for one in row) for row in self.places]

    @property
    def ratio(self) -> float | None:
        """Share of all tokens of the batch that stays; None without pictures."""
        before = sum(sum(row) for row in self.given if row is not None)
        return sum(kept or 0 for kept in self.counts) / before if before else None


class TokenReducer(ABC):
    """A way to spare visual tokens.

    On a `MultimodalLM` one statement covers answers, losses and features::

        with FastV(keep_tokens=16, layer=2).on(model):
            model.answer(images, questions)
            model.loss(batch)

    On a network of transformers the inputs are rewritten by hand; nothing needs to be known of
    whether the method works before or between the decoder layers::

        with reducer.on(network):
            network.generate(**reducer.reduced(network, inputs))

    The context leaves weights and their names alone, and removes its hooks when it is left, also by
    an error. One reducer is active at a time. A copy of the model that is made within the context
    is not reduced.

    Attributes:
        kept: of the last batch.

    Args:
        keep_tokens: see `TokenBudget`.
        keep_ratio: see `TokenBudget`.

    Raises:
        ConfigurationError: see `TokenBudget`.
    """

    def __init__(
        self,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
    ) -> None:
        self.budget = TokenBudget(keep_tokens, keep_ratio)
        self.kept: KeptTokens | None = None

    @contextmanager
    def on(self, model: MultimodalLM | nn.Module) -> Iterator[Self]:
        """Spare tokens of a model or a network of transformers, within a context.

        Raises:
            ConfigurationError: another reducer is active, or see the class.
            CapabilityError: the network cannot be reduced.
        """
        known = isinstance(model, MultimodalLM)
        network = unwrapped(model.network if known else model)  # type: ignore[arg-type]
        rewriting = model.rewriting(self) if known else nullcontext()  # type: ignore[operator]
        with rewriting, self._attached(network):
            yield self

    @abstractmethod
    def reduced(
        self, network: nn.Module, inputs: Inputs, pictures: Pictures | None = None
    ) -> dict[str, Any]:
        """Rewrite the inputs of a network; a `MultimodalLM` calls it by itself.

        Args:
            network: of transformers.
            inputs: its inputs, with ``labels`` or not.
            pictures: of every row, for scorers that look at them.
        """

    def _attached(self, network: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()
