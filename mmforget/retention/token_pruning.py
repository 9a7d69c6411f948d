"""Dropping visual tokens between two decoder layers: the mechanism behind every in-LLM pruner."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mmforget.errors import CapabilityError, ConfigurationError, DataError, suggest
from mmforget.models.multimodals.attention import recomputed_attention
from mmforget.models.multimodals.base import Inputs, MultimodalFamily, family_of
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.retention.picture_blocks import Block, picture_blocks
from mmforget.retention.pruned_pass import PrunedPass, everything, kept_tokens, repeated_rows
from mmforget.retention.pruning_limits import COMPILED, check_cache, check_network
from mmforget.retention.token_budget import Scope
from mmforget.retention.token_reduction import (
    Pictures,
    TokenReducer,
    TokenScorer,
)
from mmforget.retention.token_selection import SeenKeys, Selection, positional

Mode = Literal["drop", "mask"]
Queries = Literal["last", "text"]
Heads = Literal["mean", "max"]
MODES, QUERIES, HEADS = get_args(Mode), get_args(Queries), get_args(Heads)


@dataclass(frozen=True)
class _Noted:
    """What `reduced` saw of the inputs that come next."""

    input_ids: Tensor
    ends: Tensor | None
    pictures: Pictures | None


class TokenPruner(TokenReducer):
    """Drop visual tokens before decoder layer K, by any score; see `FastV` for that of attention.

    In the pass over the prompt, layers 0 to K - 1 see all tokens. Before layer K every picture
    loses all tokens but those of the highest scores; later layers, their caches and masks are that
    much shorter. Positions stay what they were, and during decoding layers below K have the full
    cache, those from K on the short one. At the end the sequence gets its length back (a dropped
    token repeats the last kept one before it), so logits and labels fit as they did before.

    Batches may mix numbers of pictures, paddings, and rows without pictures, which keep all they
    have; a batch without pictures, or a budget that covers all tokens, changes no bit. Rows that
    keep fewer tokens than others of the batch are padded to theirs, so speed follows the longest
    row. All runs by forward hooks; the weights and their names stay as they are.

    Static, sliding and quantised caches, compiled networks, flash and flex kernels, and assisted
    decoding are refused; so is chunked prefill once its second chunk arrives. A cache that was
    filled within the context must be used within it. With gradient checkpointing, recomputed layers
    take the selection of their first run. ``output_hidden_states`` and ``output_attentions`` give
    what the layers see, so lengths differ by layer.

    Args:
        scorer: gives the tokens of one picture their scores; `RandomScores`, `GridScores`,
            `AttentionScores`, or a callable of yours.
        keep_tokens: see `TokenBudget`.
        keep_ratio: see `TokenBudget`.
        layer: K, from 1 to the number of layers - 1.
        mode: ``drop``, or ``mask``, which only hides the tokens from layers K on: same results, no
            gain in speed; for tests.
        scope: whether budgets are for each picture (or tile) or for all tokens of a row together.
        turns: accept further prompts on a filled cache, and prune the pictures in them too. Refused
            by default, since a chunk of a longer prompt looks the same.

    Raises:
        ConfigurationError: a setting out of range.
    """

    _active: ClassVar[WeakIdKeyDictionary] = WeakIdKeyDictionary()
    _network: Any
    _family: MultimodalFamily
    _first: nn.Module
    _noted: _Noted | None
    _patches: list[tuple[int, int]] | None
    _called: dict[str, Any]
    _pass: PrunedPass | None
    _passes: WeakIdKeyDictionary  # by the cosines that a pass hands to its layers
    _caches: weakref.WeakKeyDictionary[Any, SeenKeys]

    def __init__(
        self,
        scorer: TokenScorer,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
        layer: int = 2,
        mode: Mode = "drop",
        scope: Scope = "picture",
        turns: bool = False,
    ) -> None:
        super().__init__(keep_tokens, keep_ratio)
        for name, value, valid in (("mode", mode, MODES), ("scope", scope, get_args(Scope))):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        if layer < 1:
            raise ConfigurationError(
                f"`layer` is {layer}; it must be at least 1, since the layer before it gives the "
                "scores"
            )
        self.scorer, self.layer, self.mode = scorer, layer, mode
        self.scope, self.turns = scope, turns
        self._forget()

    def reduced(
        self, network: nn.Module, inputs: Inputs, pictures: Pictures | None = None
    ) -> dict[str, Any]:
        """Leave the inputs as they are, and take note of where their prompts end."""
        labels = inputs.get("labels")
        ends = None
        if labels is not None:
            answered = labels != IGNORED
            ends = torch.where(answered.any(dim=1), answered.int().argmax(dim=1) - 1, -1)
        self._noted = _Noted(inputs["input_ids"], ends, pictures)
        return dict(inputs)

    # ---- hooks ----------------------------------------------------------------------------------

    @contextmanager
    def _attached(self, network: nn.Module) -> Iterator[None]:
        family = family_of(network)
        layers = family.layers(network)
        if network in self._active or any(self is other for other in self._active.values()):
            raise ConfigurationError(
                "the visual tokens of this network are already being pruned, or this pruner is at "
                "work on another one; leave that context first"
            )
        check_network(network, family, self.layer)
        core = network.get_submodule(family.language.rpartition(".")[0])
        last: Any = layers[self.layer - 1]
        hooks: list[tuple[nn.Module, Callable[..., Any], bool]] = [
            (family.vision_tower(network), self._see_pictures, True),
            (core, self._begin, True),
            (layers[0], self._enter, True),
            (last.self_attn, self._weigh, False),
            *((layer, self._narrow, True) for layer in layers[self.layer :]),
            (family.language_model(network), self._restore, False),
        ]
        self._network, self._family, self._first = network, family, layers[self.layer]
        handles = []
        self._active[network] = self
        try:
            for module, hook, before in hooks:
                register = (
                    module.register_forward_pre_hook if before else module.register_forward_hook
                )
                handles.append(register(_only(module, hook), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._active.pop(network, None)
            self._forget()

    def _forget(self) -> None:
        self._noted = self._patches = self._pass = None
        self._called = {}
        self._passes, self._caches = WeakIdKeyDictionary(), weakref.WeakKeyDictionary()

    def _see_pictures(self, tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the grids of the pictures, which `generate` does not hand on."""
        grids = kwargs.get("grid_thw")
        if grids is not None:
            self._patches = [(int(h), int(w)) for _, h, w in grids.tolist()]
        else:
            pixels = positional(args, kwargs, "pixel_values")
            self._patches = self._family.raw_grids(
                self._network, {"pixel_values": pixels}, len(pixels)
            )

    def _begin(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A new forward pass begins: nothing of the last one may be used."""
        if torch.compiler.is_compiling():
            raise CapabilityError(COMPILED)
        features = kwargs.get("mm_encoder_outputs") or {}
        self._called = {
            "input_ids": args[0] if args else kwargs.get("input_ids"),
            "attention_mask": kwargs.get("attention_mask"),
            "pictures": kwargs.get("pixel_values") is not None
            or (not isinstance(features, dict) or features.get("image") is not None),
        }
        if kwargs.get("pixel_values") is not None:
            self._patches = None  # the tower is about to say
        self._pass = None

    def _enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first layer: the visual tokens are known, and what the cache holds."""
        cosines = kwargs["position_embeddings"][0]
        if cosines in self._passes:
            return  # recomputed for the backward pass
        hidden = positional(args, kwargs)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        check_cache(cache)
        past = int(cache.get_seq_length()) if cache is not None else 0
        self._pass = self._passes[cosines] = self._started(hidden, cache, past)

    def _started(self, hidden: Tensor, cache: Any, past: int) -> PrunedPass:
        batch, number, _ = hidden.shape
        if past and number > 1 and not self.turns:
            raise CapabilityError(
                f"{number} tokens were given at once to a cache that holds {past}: chunked prefill "
                "and assisted decoding are not supported while tokens are pruned; for a second "
                "prompt set `turns`"
            )
        input_ids = self._called.get("input_ids")
        if input_ids is None and (number > 1 or not past):
            raise DataError(
                "visual tokens are found by `input_ids`, which this call lacks; give them instead "
                "of `inputs_embeds`"
            )
        before = None if cache is None else self._caches.get(cache)
        if before is not None and before.seen != past:
            raise CapabilityError(
                f"the cache holds {past} tokens, but {before.seen} were pruned into it; caches "
                "that are shortened or shared are not supported while tokens are pruned"
            )
        visual = torch.zeros(batch, number, dtype=torch.bool, device=hidden.device)
        if input_ids is not None and self._called["pictures"]:
            visual = self._family.visual_mask(self._network, input_ids)
        attended = torch.ones_like(visual)
        mask = self._called.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            attended = mask[:, -number:].bool()
        ends = number - 1 - attended.int().flip(1).argmax(dim=1)
        noted = self._taken(input_ids) if bool(visual.any()) else None
        pictures = None
        if noted is not None:
            repeats = batch // len(noted.input_ids)
            if noted.ends is not None:
                known = noted.ends.to(ends.device).repeat_interleave(repeats)
                ends = torch.where(known >= 0, known, ends)
            if noted.pictures is not None:
                pictures = [shown for shown in noted.pictures for _ in range(repeats)]
        blocks: list[list[Block]] = [[] for _ in range(batch)]
        if bool(visual.any()):
            blocks = picture_blocks(self._family, self._network, visual, self._patches)
            self._patches = None
        budgets = self._budgets(blocks)
        wanted = any(
            sum(left) < sum(len(block.places) for block in row)
            for left, row in zip(budgets, blocks, strict=True)
        )
        if bool(visual.any()):
            self.kept = everything(blocks)
        return PrunedPass(
            visual, attended, ends, blocks, budgets, repeated_rows(hidden), pictures, before, cache,
            wanted,
        )  # fmt: skip

    def _taken(self, input_ids: Any) -> _Noted | None:
        noted, self._noted = self._noted, None
        if noted is None or noted.input_ids.shape[1:] != input_ids.shape[1:]:
            return None
        repeats, rest = divmod(len(input_ids), len(noted.input_ids))
        rows = noted.input_ids.to(input_ids.device).repeat_interleave(max(repeats, 1), dim=0)
        return noted if not rest and torch.equal(rows, input_ids) else None

    def _budgets(self, blocks: list[list[Block]]) -> list[list[int]]:
        """Per row what each picture keeps, or with scope ``row`` one number for all."""
        if self.scope == "row":
            shown = [sum(len(block.places) for block in row) for row in blocks]
            left = iter(self.budget.kept([number for number in shown if number]))
            return [[next(left)] if number else [] for number in shown]
        left = iter(self.budget.kept([len(block.places) for row in blocks for block in row]))
        return [[next(left) for _ in row] for row in blocks]

    def _weigh(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """After the attention of layer K - 1: what the new tokens receive of it."""
        found = self._passes.get(kwargs["position_embeddings"][0])
        queries = getattr(self.scorer, "queries", None)
        if found is None or found.decided or not found.wanted or queries is None:
            return
        rows, weight = found.ends[:, None], None
        if queries == "text":
            places = torch.arange(found.visual.shape[1], device=found.visual.device)
            asked = ~found.visual & found.attended & (places <= found.ends[:, None])
            most = int(asked.sum(dim=1).max())
            rows = torch.sort(asked.int(), dim=1, descending=True, stable=True).indices[:, :most]
            weight = asked.gather(1, rows).float()[..., None]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        keys = None if cache is None else cache.layers[module.layer_idx].keys
        with torch.no_grad():
            weights = recomputed_attention(
                module,
                positional(args, kwargs),
                kwargs["position_embeddings"],
                kwargs.get("attention_mask"),
                rows,
                keys,
            )
        mean = getattr(self.scorer, "heads", "mean") == "mean"
        received = weights.mean(dim=1) if mean else weights.amax(dim=1)
        if weight is None:
            received = received[:, 0]
        else:
            received = (received * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        found.attention = received[:, -found.visual.shape[1] :]

    def _narrow(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before every layer from K on: hand it what is left."""
        found = self._passes.get(kwargs["position_embeddings"][0])
        if found is None:
            return None
        hidden = positional(args, kwargs)
        if not found.decided:
            found.decided = True
            found.selection = self._selected(found, hidden)
        chosen = found.selection
        if chosen is None:
            return None
        kwargs = dict(kwargs)
        if layer is self._first:
            hidden = chosen.states(hidden)
        kernel = str(layer.self_attn.config._attn_implementation)
        kwargs["attention_mask"] = chosen.mask(
            kwargs.get("attention_mask"), "eager" in kernel, hidden.dtype
        )
        kwargs["position_embeddings"] = tuple(map(chosen.positions, kwargs["position_embeddings"]))
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = chosen.numbers(kwargs["position_ids"])
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _restore(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """After the last layer: give the sequence its length back."""
        chosen = self._pass.selection if self._pass is not None else None
        if chosen is None or bool(chosen.kept.all()):
            return None
        output.last_hidden_state = chosen.restored(output.last_hidden_state)
        return output

    # ---- selection ------------------------------------------------------------------------------

    def _selected(self, found: PrunedPass, hidden: Tensor) -> Selection | None:
        if not found.wanted and found.before is None:
            return None
        kept = torch.ones_like(found.visual)
        if found.wanted:
            kept, self.kept = kept_tokens(found, hidden.detach(), self.scorer, self.scope == "row")
        batch, number = kept.shape
        before = found.before
        if before is None:
            past = 0 if found.cache is None else found.cache.get_seq_length() - number
            before = SeenKeys.all(batch, max(past, 0), kept.device)
        chosen = Selection.of(kept, before, self.mode == "drop")
        if found.cache is not None:
            self._caches[found.cache] = chosen.keys
        return chosen


def _only(module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that copies of the module, which carry it too, ignore."""
    known = weakref.ref(module)
    return lambda called, *given: hook(called, *given) if called is known() else None
