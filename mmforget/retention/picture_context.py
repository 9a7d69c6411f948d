"""Token sequences in which pictures may stand anywhere, read piece by piece into a cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.models.base import Batch
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import Inputs, unwrapped
from mmforget.models.multimodals.encoding import Padding


class Picture(NamedTuple):
    """A picture, or a tile of one, as the language model gets to see it.

    Attributes:
        tokens: (N, D) visual tokens, after the projector.
        grid: (h, w) that they form, row by row; None if they form none.
    """

    tokens: Tensor
    grid: tuple[int, int] | None

    def pooled(self, pool: int) -> Picture:
        """Average `pool` x `pool` tokens each: ``ceil(h / pool) * ceil(w / pool)`` remain.

        Raises:
            CapabilityError: the tokens form no grid.
        """
        if pool == 1:
            return self
        if self.grid is None:
            raise CapabilityError(
                f"{len(self.tokens)} visual tokens of a picture form no grid and cannot be pooled; "
                "use `pool` 1"
            )
        plane = self.tokens.T.unflatten(1, self.grid)[None]
        small = (-(-self.grid[0] // pool), -(-self.grid[1] // pool))
        return Picture(F.adaptive_avg_pool2d(plane, small)[0].flatten(1).T, small)


@dataclass
class Span:
    """A piece of a sequence: token ids, placeholders among them, and the pictures that fill those.

    Attributes:
        ids: token ids.
        pictures: in the order of their placeholders.
    """

    ids: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __add__(self, other: Span) -> Span:
        return Span(self.ids + other.ids, self.pictures + other.pictures)


def prompts(model: MultimodalLM, batch: Batch, pictures: bool = True) -> list[Span]:
    """The questions of a batch as the chat template puts them.

    Args:
        model: the model.
        batch: with ``images`` and ``question``.
        pictures: show the pictures; False asks the same without them.
    """
    shown = batch["images"] if pictures else [[] for _ in batch["question"]]
    asked = {"images": shown, "question": batch["question"]}
    return spans(model, model.inputs(asked, padding="left", answers=False))


def spans(model: MultimodalLM, inputs: Inputs) -> list[Span]:
    """The rows of encoded inputs, without padding; the tower and the projector run once."""
    features = pictures_of(model, inputs)
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), features, strict=True)
    return [Span(ids[real].tolist(), own) for ids, real, own in rows]


def pictures_of(model: MultimodalLM, inputs: Inputs) -> list[list[Picture]]:
    """The visual tokens of every row's pictures.

    Raises:
        ConfigurationError: a token reducer is at work.
    """
    _refuse_reducers(model)
    network = unwrapped(model.network)
    if inputs.get("pixel_values") is None:
        return [[] for _ in inputs["input_ids"]]
    found = model.family.encode_images(network, inputs)
    all_ = [Picture(*pair) for pair in zip(found.pooled, found.grid, strict=True)]
    counts = [len(picture.tokens) for picture in all_]
    numbers = model.family.pictures_per_row(network, inputs, counts)
    starts = [sum(numbers[:row]) for row in range(len(numbers))]
    return [all_[start : start + n] for start, n in zip(starts, numbers, strict=True)]


def _refuse_reducers(model: MultimodalLM) -> None:
    if model.rewriter is not None:
        raise ConfigurationError(
            f"{type(model.rewriter).__name__} spares visual tokens of this model, and cannot do so "
            "while pictures are read in pieces; leave its context first"
        )


def chosen(pictures: Sequence[Picture], indices: Sequence[int] | None, given: int) -> list[Picture]:
    """Those pictures of a row that are to be shown again.

    Args:
        pictures: of the row.
        indices: which, from 0; None takes all.
        given: how many pictures the row has, which may be cut into more tiles.

    Raises:
        ConfigurationError: a picture that the row does not have, or one in tiles.
    """
    if indices is None or not pictures:
        return list(pictures)
    if len(pictures) != given:
        raise ConfigurationError(
            f"`pictures` is {list(indices)}, but {given} pictures come in {len(pictures)} tiles; "
            "leave it out to show all of them"
        )
    outside = [index for index in indices if not 0 <= index < given]
    if outside:
        raise ConfigurationError(
            f"`pictures` is {list(indices)}, but a question has {given} pictures, counted from 0"
        )
    return [pictures[index] for index in indices]


def block(model: MultimodalLM, pictures: Sequence[Picture]) -> Span:
    """Placeholders for pictures, each with the tokens that the family puts around one."""
    network = unwrapped(model.network)
    before, after = model.family.picture_frame(network, model.processor)
    token = model.family.image_token_ids(network)[0]
    ids: list[int] = []
    for picture in pictures:
        ids += [*before, *[token] * len(picture.tokens), *after]
    return Span(ids, list(pictures))


def words(model: MultimodalLM, text: str) -> Span:
    """A text as tokens, without begin and end."""
    return Span(list(model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]))


def collated(
    model: MultimodalLM, rows: Sequence[Span], padding: Padding = "left"
) -> dict[str, Tensor]:
    """Pad sequences and put the visual tokens in the place of their placeholders.

    Returns:
        ``inputs_embeds`` (B, L, D), ``attention_mask`` (B, L), ``input_ids`` (B, L) for whoever
        wants to know, and ``position_ids`` (3, B, L) where the family needs them.

    Raises:
        CapabilityError: a model with Vision Remember.
    """
    network = unwrapped(model.network)
    length = max(len(row.ids) for row in rows)
    device = next(network.parameters()).device
    # any word will do as padding, since the mask hides it
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = length - len(row.ids) if padding == "left" else 0
        ids[number, start : start + len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        mask[number, start : start + len(row.ids)] = 1
    ids, mask = ids.to(device), mask.to(device)
    embeds = model.family.language_model(network).get_input_embeddings()(ids)
    pictures = [picture for row in rows for picture in row.pictures]
    if pictures and hasattr(model, "remembering"):
        raise CapabilityError(
            "pictures cannot be shown again to a model with Vision Remember, whose modules need "
            "the tower's own features; use `MultimodalLM`"
        )
    if pictures:
        tokens = torch.cat([picture.tokens for picture in pictures]).to(embeds)
        where = model.family.visual_mask(network, ids)
        assert int(where.sum()) == len(tokens)  # `block` and the processor see to that
        embeds = embeds.masked_scatter(where[..., None], tokens)
    found = {"inputs_embeds": embeds, "attention_mask": mask, "input_ids": ids}
    positions = model.family.position_ids(network, found | _grids(model, rows, device))
    return found if positions is None else found | {"position_ids": positions}


def _grids(model: MultimodalLM, rows: Sequence[Span], device: torch.device) -> dict[str, Tensor]:
    grids = [p.grid for row in rows for p in row.pictures if p.grid is not None]
    given = model.family.grid_inputs(unwrapped(model.network), grids)
    return {key: value.to(device) for key, value in given.items()}


class Reader:
    """Reads sequences into a cache and goes on greedily; what is cached can be hidden again.

    Rows are padded at the left. Positions go on as if nothing had been hidden. Placeholders of
    pictures are never said, since there would be no picture behind them.

    Args:
        model: in evaluation mode.

    Raises:
        ConfigurationError: a token reducer is at work.
    """

    def __init__(self, model: MultimodalLM) -> None:
        from transformers import DynamicCache

        _refuse_reducers(model)
        self.model = model
        self.cache = DynamicCache()
        known = inspect.signature(unwrapped(model.network).forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._around = getattr(model, "remembering", nullcontext)
        self.visible = torch.zeros(0, 0, dtype=torch.int64)
        self.visual = torch.zeros(0, 0, dtype=torch.bool)
        self._next = torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def read(self, spans: Sequence[Span]) -> Tensor:
        """Read one piece per row behind what was read before.

        Returns:
            (B, V) scores of the next token.
        """
        given = collated(self.model, spans)
        mask, ids = given.pop("attention_mask"), given["input_ids"]
        given.pop("inputs_embeds" if not any(span.pictures for span in spans) else "input_ids")
        return self._forward(given, ids, mask)

    @torch.no_grad()
    def read_native(self, inputs: Inputs, question: Tensor | None = None) -> Tensor:
        """Read encoded inputs, padded at the left, with the pictures as pixels: the first piece.

        Everything that listens to the network's vision tower works here.

        Args:
            inputs: of the network.
            question: (B, L) bool: where the question stands, if the answer has begun already.

        Returns:
            (B, V) scores of the next token.
        """
        network = unwrapped(self.model.network)
        self.model.family.check_images(network, inputs)
        given = self.model.family.model_inputs(inputs)
        mask = given.pop("attention_mask")
        positions = self.model.family.position_ids(network, inputs)
        if positions is not None:
            given["position_ids"] = positions
        return self._forward(given, inputs["input_ids"], mask, question)

    def _forward(
        self, given: dict[str, Any], ids: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> Tensor:
        if not len(self.visible):
            self.visible = mask[:, :0]
            self.visual = mask[:, :0].bool()
            self._next = mask.new_zeros(len(mask))
        network = unwrapped(self.model.network)
        self.visible = torch.cat([self.visible, mask], dim=1)
        self.visual = torch.cat([self.visual, self.model.family.visual_mask(network, ids)], dim=1)
        given["position_ids"] = self._positions(given.get("position_ids"), mask)
        with self._around(question):
            output = self.model.network(
                **given,
                attention_mask=self.visible,
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: self.cache},
            )
        banned = list(self.model.family.image_token_ids(network))
        logits: Tensor = output.logits[:, -1]
        logits[:, banned] = -torch.inf
        return logits

    def _positions(self, own: Tensor | None, mask: Tensor) -> Tensor:
        """Positions of a piece: those within it, moved behind what was read before."""
        if own is None:
            own = (mask.cumsum(dim=1) - 1).clamp(min=0)
        # a picture takes as many positions as its longer side has tokens, wherever it stands
        found = own + self._next[:, None]
        real = found.masked_fill(~mask.bool(), -1)
        last = real.amax(dim=(0, 2) if real.ndim == 3 else 1)
        self._next = torch.maximum(self._next, last + 1)  # a row may have nothing but padding
        return found

    def hide_pictures(self) -> None:
        """Drop all visual tokens that were read so far: nothing attends to them any more."""
        self.visible = self.visible.masked_fill(self.visual, 0)

    def greedy(self, logits: Tensor, length: int) -> list[list[int]]:
        """The most probable tokens up to the end of the turn, which is left out.

        Args:
            logits: (B, V) that `read` gave.
            length: most tokens per row.
        """
        ends, rows = set(self.model.end_ids), [Answer() for _ in logits]
        for step in range(length):
            tokens = logits.argmax(dim=-1).tolist()
            for row, token in zip(rows, tokens, strict=True):
                row.take(token, ends)
            if step + 1 == length or all(row.done for row in rows):
                break
            logits = self.read([Span([token]) for token in tokens])
        return [row.tokens for row in rows]


@dataclass
class Answer:
    """What one row has said so far.

    Attributes:
        tokens: without the end of the turn.
        done: whether the turn has ended.
    """

    tokens: list[int] = field(default_factory=list)
    done: bool = False

    def take(self, token: int, ends: set[int]) -> Self:
        """Add a token, unless the turn has ended or this one ends it."""
        self.done = self.done or token in ends
        if not self.done:
            self.tokens.append(token)
        return self


def text_of(model: MultimodalLM, tokens: Sequence[int]) -> str:
    """Tokens as a text, without special ones and outer white space."""
    text: str = model.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()
