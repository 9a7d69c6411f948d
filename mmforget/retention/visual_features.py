"""Fewer visual tokens before the language model: other features, and a shorter prompt for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, DataError
from mmforget.models.multimodals.base import (
    VISION_KEYS,
    Inputs,
    MultimodalFamily,
    family_of,
    unwrapped,
)
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.retention.token_budget import highest
from mmforget.retention.token_reduction import (
    KeptTokens,
    Pictures,
    PictureTokens,
    TokenReducer,
    TokenScorer,
)
from mmforget.retention.tower_attention import TowerView

SEQUENCES = ("input_ids", "attention_mask", "labels", "token_type_ids")
"""Inputs (B, L) that are shortened with the prompt."""


class FeatureReducer(TokenReducer):
    """Give the language model fewer visual tokens, and a prompt with that many placeholders.

    The tower runs on the whole picture. The features that stay go to the network by transformers'
    own argument for ready features (``mm_encoder_outputs``), placeholders that have none leave the
    prompt, its padding stays on its side, and labels move with their tokens. With 0 tokens the row
    is a text in which only the marks around the picture are left. A budget that covers all tokens
    gives the inputs back as they were.

    The positions of Qwen2-VL and Qwen2.5-VL come from the grid of the picture: those of the tokens
    that stay are kept from the full prompt, text included. All other networks count the shorter
    prompt, unless `keep_positions`. InternVL wants one number of tokens for all pictures of a batch
    when it generates with beams.

    Args:
        keep_tokens: see `TokenBudget`.
        keep_ratio: see `TokenBudget`.
        keep_positions: keep the positions of the full prompt for every family.
    """

    merges: ClassVar[bool] = False

    def __init__(
        self,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
        keep_positions: bool = False,
    ) -> None:
        super().__init__(keep_tokens, keep_ratio)
        self.keep_positions = keep_positions

    @abstractmethod
    def chosen(self, tokens: PictureTokens) -> tuple[Tensor, Tensor]:
        """Features (k, D) that stay of a picture, k at most `tokens.keep`, and their places (k,).

        Places are ascending and distinct.
        """

    def viewed(self, family: MultimodalFamily, network: Any, inputs: Inputs) -> TowerView:
        """Encode the pictures, for methods that ask for it with a look into the tower."""
        features = family.encode_images(network, inputs)
        nothing = [None] * len(features.pooled)
        return TowerView(features, nothing, nothing)

    def reduced(
        self, network: nn.Module, inputs: Inputs, pictures: Pictures | None = None
    ) -> dict[str, Any]:
        """Encode the pictures, reduce their tokens and shorten the prompt.

        Raises:
            DataError: the inputs hold ready features, or padding on both sides.
        """
        base: Any = unwrapped(network)
        family = family_of(base)
        if inputs.get("mm_encoder_outputs"):
            raise DataError("the inputs hold ready visual features; give `pixel_values` instead")
        rows = len(inputs["input_ids"])
        if inputs.get("pixel_values") is None:
            self.kept = KeptTokens([None] * rows, [None] * rows)
            return dict(inputs)
        view = self.viewed(family, base, inputs)
        features = view.features
        counts = [len(one) for one in features.pooled]
        budgets = self.budget.kept(counts)
        shown = family.pictures_per_row(base, inputs, counts)
        visual = family.visual_mask(base, inputs["input_ids"])
        keep = ~visual
        kept: list[list[Tensor] | None] = []
        given: list[list[int] | None] = []
        parts: list[Tensor] = []
        used = 0
        for row, number in enumerate(shown):
            places = visual[row].nonzero()[:, 0]
            images = pictures[row] if pictures is not None else ()
            left = []
            for picture in range(number):
                one = PictureTokens(
                    features.pooled[used],
                    budgets[used],
                    features.grid[used],
                    row,
                    picture,
                    view.attention[used],
                    view.keys[used],
                    images[picture] if len(images) == number else None,
                )
                found, at = self._of(one)
                keep[row, places[: counts[used]][at.to(places.device)]] = True
                places, used = places[counts[used] :], used + 1
                left.append(at.cpu())
                if len(found):
                    parts.append(found)
            kept.append(left if number else None)
            given.append(counts[used - number : used] if number else None)
        self.kept = KeptTokens(kept, given, self.merges)
        if budgets == counts:
            return dict(inputs)
        return self._shortened(family, base, inputs, keep, parts)

    def _of(self, tokens: PictureTokens) -> tuple[Tensor, Tensor]:
        number = len(tokens.features)
        if tokens.keep >= number:
            return tokens.features, torch.arange(number)
        return self.chosen(tokens)

    def _shortened(
        self,
        family: MultimodalFamily,
        network: Any,
        inputs: Inputs,
        keep: Tensor,
        parts: list[Tensor],
    ) -> dict[str, Any]:
        positions = family.position_ids(network, inputs)
        if positions is None and self.keep_positions:
            positions = _counted(inputs)
        found = {
            key: value
            for key, value in inputs.items()
            if key not in (*VISION_KEYS, *SEQUENCES, "mm_token_type_ids", "position_ids")
        }
        found |= shortened(inputs, keep, _padding_id(network))
        if positions is not None:
            found["position_ids"] = shortened_positions(inputs, keep, positions)
        if parts:
            found["mm_encoder_outputs"] = family.encoder_outputs(parts)
        return found


class ChosenTokens(FeatureReducer):
    """Keep the visual tokens of the highest scores, before the language model.

    Args:
        scorer: gives the tokens of one picture their scores; `RandomScores`, `GridScores`, or a
            callable of yours.
        keep_tokens: see `TokenBudget`.
        keep_ratio: see `TokenBudget`.
        keep_positions: see `FeatureReducer`.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
        keep_positions: bool = False,
    ) -> None:
        super().__init__(keep_tokens, keep_ratio, keep_positions)
        self.scorer = scorer

    def chosen(self, tokens: PictureTokens) -> tuple[Tensor, Tensor]:
        """The tokens of the highest scores."""
        scores = self.scorer(tokens).to(tokens.features.device)
        if scores.shape != tokens.features.shape[:1]:
            raise ConfigurationError(
                f"the scorer returned {tuple(scores.shape)} for a picture of "
                f"{len(tokens.features)} visual tokens; it must return one score for each"
            )
        places = highest(scores, tokens.keep)
        return tokens.features[places], places


def shortened(inputs: Inputs, keep: Tensor, padding_id: int = 0) -> dict[str, Tensor]:
    """Take tokens out of a padded batch, and pad it anew on the same side.

    Args:
        inputs: with ``input_ids`` (B, L), and any of `SEQUENCES`.
        keep: (B, L) bool.
        padding_id: of the new padding.

    Returns:
        The shortened ones of `SEQUENCES`, with an attention mask.

    Raises:
        DataError: rows are padded on different sides.
    """
    order, valid = _order(inputs, keep)
    fill = {"input_ids": padding_id, "labels": IGNORED}
    found = {"attention_mask": valid.long()}
    for key in SEQUENCES:
        if key != "attention_mask" and inputs.get(key) is not None:
            found[key] = inputs[key].gather(1, order).masked_fill(~valid, fill.get(key, 0))
    return found


def shortened_positions(inputs: Inputs, keep: Tensor, positions: Tensor) -> Tensor:
    """Positions (B, L) or (3, B, L) of the tokens that stay; see `shortened`."""
    order, valid = _order(inputs, keep)
    index = order.expand(*positions.shape[:-2], -1, -1)
    return positions.gather(-1, index).masked_fill(~valid, 0)


def _order(inputs: Inputs, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens the shorter rows hold, (B, L'), and which of them are real."""
    mask = inputs.get("attention_mask")
    real = torch.ones_like(keep) if mask is None else mask.bool()
    left, right = ~real[:, 0], ~real[:, -1]
    if bool(left.any()) and bool(right.any()):
        raise DataError(
            f"row {int(left.nonzero()[0])} of the batch is padded on the left and row "
            f"{int(right.nonzero()[0])} on the right; pad all rows on one side"
        )
    stay = real & keep
    most = int(stay.sum(dim=1).max())
    at_right = bool(right.any()) or (not bool(left.any()) and inputs.get("labels") is not None)
    order = torch.sort(stay.int(), dim=1, descending=at_right, stable=True).indices
    order = order[:, :most] if at_right else order[:, order.shape[1] - most :]
    return order, stay.gather(1, order)


def _counted(inputs: Inputs) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _padding_id(network: Any) -> int:
    for config in (network.generation_config, network.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return int(config.pad_token_id)
    return 0
