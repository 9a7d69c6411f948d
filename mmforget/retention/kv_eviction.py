"""Evict keys and values from the cache of the decoder while it generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError, DataError, suggest
from mmforget.models.multimodal_files import check_device
from mmforget.models.multimodals.attention_tap import (
    AttentionCall,
    cache_of,
    intercepted_attention,
)
from mmforget.models.multimodals.base import family_of, unwrapped
from mmforget.retention.evicting_layer import evicting_layer
from mmforget.retention.eviction_policy import EvictionPolicy, Rows, Step

When = Literal["prefill", "every_step"]
Mode = Literal["drop", "mask"]


class KVEviction:
    """Keeps at most `budget` keys per decoder layer, chosen by a policy. A context manager.

    Every layer, and with `per_head` every key head, chooses for itself. Positions are in the keys
    already, and the cache goes on telling the length of the whole sequence, so the next token gets
    the place that it would have had. (The other way known is to leave layer 0 whole, from which
    transformers reads the length; that keeps the memory of one layer and gives layer 0 more than
    the others.) Masks are brought to the keys of each layer, so padded batches are right.

    Network and weights stay as they are; all hooks are gone after the block. A cache that was
    filled in the block can be used in no other one.

    Args:
        network: of a supported family, maybe wrapped by peft; on sdpa or eager.
        policy: scores the keys.
        budget: keys that stay, or as a float the share of the prompt (rounded half up). Protected
            keys count, but stay even where they are more. At or above the number of keys nothing
            happens, to the last bit.
        when: ``prefill`` evicts after every pass of more than one token, that is after the prompt;
            new tokens then come on top. ``every_step`` also after every new token.
        per_head: whether key heads choose separately; else their scores are summed.
        sink: protect the first so many tokens.
        recent: protect the last so many tokens.
        visual_only: protect all that is no visual token, generated text too.
        mode: ``drop`` frees the memory; ``mask`` only hides the keys, which is slower and gives the
            same answers, for tests.
        block: query rows of the prompt whose attention is formed at a time.

    Attributes:
        lengths: per decoder layer the keys that its cache held after the last pass.

    Raises:
        ConfigurationError: a setting has no meaning, or the policy cannot work at every step.
        CapabilityError: inside of the block, for caches that are not plain dynamic ones (static,
            sliding window, quantised, offloaded), filled elsewhere, or shortened afterwards
            (assisted decoding).
        ModelError: half precision on the CPU.

    Example:
        ```python
        with KVEviction(network, A2SF(alpha=0.3), budget=0.2, recent=16) as eviction:
            network.generate(**inputs)
        print(eviction.lengths)
        ```
    """

    def __init__(
        self,
        network: nn.Module,
        policy: EvictionPolicy,
        budget: int | float,
        when: When = "prefill",
        per_head: bool = True,
        sink: int = 0,
        recent: int = 0,
        visual_only: bool = False,
        mode: Mode = "drop",
        block: int = 128,
    ) -> None:
        for name, choice, valid in (("when", when, get_args(When)), ("mode", mode, get_args(Mode))):
            if choice not in valid:
                raise ConfigurationError(f"`{name}` is '{choice}', {suggest(choice, valid)}")
        if budget < 0 or (isinstance(budget, float) and not budget <= 1):
            raise ConfigurationError(
                f"`budget` is {budget}; give a number of keys from 0, or a share of the prompt as "
                "a float in [0, 1]"
            )
        for name, value, least in (("sink", sink, 0), ("recent", recent, 0), ("block", block, 1)):
            if value < least:
                raise ConfigurationError(f"`{name}` is {value}; it must be at least {least}")
        if policy.prefill_only and when != "prefill":
            raise ConfigurationError(
                f"{type(policy).__name__} scores the prompt only; use when='prefill'"
            )
        check_device(network)
        self.network, self.policy, self.budget = network, policy, budget
        self.when, self.per_head, self.mode = when, per_head, mode
        self.sink, self.recent, self.visual_only = sink, recent, visual_only
        self.block = block
        self.lengths: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._visual: Tensor | None = None
        self._stack = ExitStack()

    @property
    def cache_bytes(self) -> int:
        """Memory of all keys and values after the last pass."""
        return sum(self._bytes.values())

    def __enter__(self) -> Self:
        base: Any = unwrapped(self.network)
        family = family_of(self.network)
        with ExitStack() as stack:  # undone if anything here fails
            for layer in family.layers(base):
                attention: Any = layer.self_attn
                handle = attention.register_forward_pre_hook(self._adopt, with_kwargs=True)
                stack.callback(handle.remove)
            handle = base.get_submodule("model").register_forward_pre_hook(
                self._find_visual, with_kwargs=True
            )
            stack.callback(handle.remove)
            stack.enter_context(intercepted_attention(self.network, self._around))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._visual = None
        self._stack.close()

    # ---- hooks ----------------------------------------------------------------------------------

    def _find_visual(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.visual_only:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ConfigurationError(
                "`visual_only` tells visual tokens by their ids; call the network with `input_ids`"
            )
        self._visual = family_of(self.network).visual_mask(unwrapped(self.network), ids)

    def _adopt(self, module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Put an own layer into the cache before the first keys arrive."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache, index = cache_of(kwargs), int(module.layer_idx)
        if cache is None:
            raise ConfigurationError(
                "there is no cache to evict from; generate with use_cache=True, or leave the block"
            )
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            offloaded = "an offloaded " if isinstance(cache, DynamicCache) else ""
            raise CapabilityError(
                f"keys cannot be evicted from {offloaded}{type(cache).__name__}; use a plain "
                "DynamicCache, the default of `generate`"
            )
        kind = evicting_layer()
        while len(cache.layers) <= index:  # without a configuration they come one by one
            cache.layers.append(kind(self))
        layer = cache.layers[index]
        if isinstance(layer, kind):
            if layer.owner is not self:
                raise CapabilityError(
                    "this cache was filled in another KVEviction block; start with a new cache"
                )
            return
        if type(layer) is not DynamicLayer:
            raise CapabilityError(
                f"layer {index} of the cache is a {type(layer).__name__}; keys can be evicted from "
                "plain dynamic layers only, without sliding windows or quantisation"
            )
        if layer.is_initialized:
            raise CapabilityError(
                f"layer {index} of the cache already holds {layer.get_seq_length()} keys; enter "
                "the KVEviction block before the prompt is read"
            )
        cache.layers[index] = kind(self)

    def _around(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        layer, queries = call.cached, call.query.shape[-2]
        start = layer.logical - queries
        valid = _own_visible(call, queries, start)
        if self._visual is not None and self._visual.shape != valid.shape:
            raise DataError(
                f"layer {call.layer} reads {valid.shape[1]} tokens of {self._visual.shape[1]}; "
                "`visual_only` cannot be combined with pruning inside of the decoder"
            )
        layer.note(valid, self._visual)
        call = replace(call, mask=layer.fitted_mask(call.mask, call.query))
        output = call.kernel(call)
        if self.when == "every_step" or queries > 1 or start == 0:
            with torch.no_grad():
                self._evict(call, layer, start, valid)
        self.lengths[call.layer] = int(layer.keys.shape[-2])
        self._bytes[call.layer] = layer.keys.nbytes + layer.values.nbytes
        return output

    # ---- choice ---------------------------------------------------------------------------------

    def _evict(self, call: AttentionCall, layer: Any, start: int, valid: Tensor) -> None:
        groups = call.key.shape[1] if self.per_head else 1
        positions, alive = layer.slots(groups)
        score = torch.zeros(positions.shape, device=call.query.device)
        if layer.score is not None:
            score[..., : layer.score.shape[-1]] = layer.score
        step = Step(call.layer, start, positions, valid, lambda last: self._rows(call, valid, last))
        score = self.policy.update(score, step)
        if score.isnan().any():
            raise DataError(
                f"the scores of {type(self.policy).__name__} in layer {call.layer} are not finite; "
                "the network's hidden states are damaged"
            )
        layer.score = score
        if layer.limit is None:
            layer.limit = self._limit(layer.real)
        protected = alive & layer.at_slots(self._protected(layer), positions)
        have = alive.sum(dim=-1)
        keep = torch.minimum(have, torch.maximum(layer.limit[:, None], protected.sum(dim=-1)))
        if bool((keep == have).all()):
            return
        rank = score.masked_fill(~alive, -torch.inf).masked_fill(protected, torch.inf)
        order = rank.argsort(dim=-1, descending=True, stable=True)[..., : int(keep.max())]
        stays = torch.arange(order.shape[-1], device=order.device) < keep[..., None]
        order, back = order.sort(dim=-1)
        layer.keep(order, stays.gather(-1, back), score, drop=self.mode == "drop")

    def _limit(self, real: Tensor) -> Tensor:
        """Keys (B,) that may stay of a prompt."""
        if isinstance(self.budget, float):
            return torch.floor(real.sum(dim=1) * self.budget + 0.5).long()
        return torch.full((len(real),), self.budget, device=real.device)

    def _protected(self, layer: Any) -> Tensor:
        """(B, L) bool: tokens whose keys stay in any case."""
        number = layer.real.cumsum(dim=1)
        recent = self.policy.recent(layer.limit).clamp(min=self.recent)
        flags = (number <= self.sink) | (number > number[:, -1:] - recent[:, None])
        if layer.visual is not None:
            flags = flags | ~layer.visual
        return flags & layer.real

    def _rows(self, call: AttentionCall, valid: Tensor, last: int | None) -> Iterator[Rows]:
        """The weights of the last rows that are no padding, block by block."""
        after = valid.flip(1).cumsum(dim=1).flip(1) - valid.long()
        wanted = valid if last is None else valid & (after < last)
        columns = wanted.any(dim=0).nonzero()[:, 0]
        groups = call.key.shape[1]
        for block in columns.split(self.block):
            weights, _ = call.weights(block.expand(len(valid), -1))
            weights = weights.unflatten(1, (groups, -1)).sum(dim=2)
            if not self.per_head:
                weights = weights.sum(dim=1, keepdim=True)
            yield Rows(weights, after[:, block], wanted[:, block])


def _own_visible(call: AttentionCall, queries: int, start: int) -> Tensor:
    """(B, Q) bool: which queries see their own key; the others are padding."""
    if call.mask is None:
        return torch.ones(len(call.query), queries, dtype=torch.bool, device=call.query.device)
    own = call.mask[:, 0].diagonal(offset=start, dim1=-2, dim2=-1)
    seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    return seen.expand(len(call.query), -1)
