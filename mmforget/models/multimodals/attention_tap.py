"""Context managers that watch the attention of the decoder while the network runs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError, suggest
from mmforget.models.multimodals.attention import (
    attention_weights,
    recomputed_attention,
    row_index,
    visible_keys,
)
from mmforget.models.multimodals.base import family_of, unwrapped

BLOCK = 128
"""Query rows whose weights exist at a time where only their mean is wanted."""

_numbers = itertools.count()


@dataclass
class AttentionCall:
    """One call of the attention function of a decoder layer.

    Attributes:
        layer: number of the decoder layer.
        module: its attention module.
        query: (B, H, Q, d), positions applied.
        key: (B, Hkv, L, d), cached ones included.
        value: (B, Hkv, L, d).
        mask: None (causal, nothing padded), bool, or additive (B, 1 or H, Q, L).
        scaling: of the products.
        cached: the layer of the cache, or None.
        kernel: runs the network's own attention function on this call.
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    cached: Any
    kernel: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]

    def weights(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, H, R, L) of the query rows `index` (B, R), and which keys those see."""
        place = index[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[-1])
        visible, bias = visible_keys(self.mask, index, self.query.shape[-2], self.key.shape[-2])
        query = self.query.gather(2, place)
        return attention_weights(query, self.key, visible, bias, self.scaling), visible


Around = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


@contextmanager
def intercepted_attention(network: nn.Module, around: Around) -> Iterator[None]:
    """Hand every attention call of the decoder to a function; the tower is left alone.

    Registers an attention function with transformers and takes it away again on leaving. Several
    may be nested; the one entered last is called first.

    Args:
        network: of a supported family, maybe wrapped by peft.
        around: gets a call and returns ``call.kernel(call)``, whose results are the network's own
            to the last bit, or something else.

    Raises:
        CapabilityError: the network runs on a kernel other than sdpa and eager.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    base = unwrapped(network)
    language = family_of(network).language_model(base)
    before = language.config._attn_implementation
    if before not in ("sdpa", "eager") and not before.startswith("mmforget"):
        raise CapabilityError(
            f"the attention kernel '{before}' cannot be tapped; load the network with "
            "attn_implementation='sdpa', or use recorded_attention(..., by='recompute')"
        )
    name = f"mmforget_{next(_numbers)}_{before}"  # others look for 'eager' in it
    stock = AttentionInterface().get(before)
    caches: dict[nn.Module, Any] = {}

    def note(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        caches[module] = cache_of(kwargs)

    def tapped(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        run = stock or sys.modules[type(module).__module__].eager_attention_forward
        cache, layer = caches.pop(module, None), int(module.layer_idx)
        scaling = kwargs.get("scaling")
        call = AttentionCall(
            layer,
            module,
            query,
            key,
            value,
            mask,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            None if cache is None else cache.layers[layer],
            lambda call: run(module, call.query, call.key, call.value, call.mask, **kwargs),
        )
        return around(call)

    with ExitStack() as stack:
        for layer in language.layers:
            handle = layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        for registry, function in (
            (AttentionInterface, tapped),
            (AttentionMaskInterface, AttentionMaskInterface()[before]),
        ):
            registry.register(name, function)
            stack.callback(registry._global_mapping.pop, name)
        stack.callback(language.set_attn_implementation, before)
        language.set_attn_implementation(name)
        yield


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a layer; transformers renamed it from `past_key_values`."""
    found = kwargs.get("cache")
    return found if found is not None else kwargs.get("past_key_values")


@dataclass(frozen=True)
class Seen:
    """What one layer attended to in one call.

    Attributes:
        layer: number of the decoder layer.
        weights: (B, H, R, L) float32; 0 for padding and for keys that the cache no longer holds.
        visible: (B, 1 or H, R, L) bool, which keys the row could see; all False in padding rows.
    """

    layer: int
    weights: Tensor
    visible: Tensor


Reduction = Literal["none", "heads", "keys"] | Callable[[Seen], Any]


@contextmanager
def recorded_attention(
    network: nn.Module,
    layers: Sequence[int] | None = None,
    rows: Literal["last", "all"] = "last",
    reduce: Reduction = "none",
    by: Literal["kernel", "recompute"] = "kernel",
) -> Iterator[dict[int, list[Any]]]:
    """Record the attention of chosen decoder layers, one entry per forward pass.

    With left padding the row ``last`` of the passes of ``generate`` are those that predict the
    first, second, ... new token. Columns are places in the sequence, also where the cache has lost
    some (`mmforget.retention.kv_eviction`). Nothing else of the network changes, and its outputs
    are the same to the last bit.

    Args:
        network: of a supported family, maybe wrapped by peft.
        layers: decoder layers, negative ones from the end; None takes all.
        rows: query rows of each pass.
        reduce: ``none`` keeps (B, H, R, L), ``heads`` their mean over heads (B, R, L), ``keys``
            that over heads and all rows but padding (B, L), formed by blocks of 128 rows. Or a
            function of `Seen`.
        by: ``kernel`` reads queries and keys off the attention function and needs sdpa or eager;
            ``recompute`` forms the queries a second time and works with any kernel.

    Yields:
        Per layer the list of entries.

    Raises:
        ConfigurationError: a layer that does not exist, or an unknown choice.
        CapabilityError: see `intercepted_attention`.

    Example:
        ```python
        with recorded_attention(network, layers=[-1], reduce="heads") as record:
            network.generate(**inputs, max_new_tokens=8)
        first = record[31][0]  # (B, 1, L)
        ```
    """
    for name, value, valid in (
        ("rows", rows, ("last", "all")),
        ("reduce", reduce, ("none", "heads", "keys")),
        ("by", by, ("kernel", "recompute")),
    ):
        if not callable(value) and value not in valid:
            raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
    decoder = family_of(network).layers(unwrapped(network))
    record: dict[int, list[Any]] = {layer: [] for layer in layer_numbers(layers, len(decoder))}

    def keep(layer: int, weights: Callable[[Tensor], Seen], states: Tensor) -> None:
        batch, queries = states.shape[0], states.shape[-2]
        wanted = None if rows == "all" else torch.tensor([-1])
        index = row_index(wanted, batch, queries, states.device)
        with torch.no_grad():
            record[layer].append(_reduced(weights, index, reduce))

    if by == "kernel":

        def around(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            if call.layer in record:
                keep(call.layer, lambda index: _seen(call, index), call.query)
            return call.kernel(call)

        with intercepted_attention(network, around):
            yield record
        return

    def hook(module: Any, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        layer = int(module.layer_idx)
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = cache_of(kwargs)
        cached = None if cache is None else cache.layers[layer]
        if hasattr(cached, "positions"):
            raise ConfigurationError(
                "attention cannot be recomputed from a cache that evicts keys; record it with "
                "by='kernel'"
            )
        keys = None if cached is None else cached.keys

        def weights(index: Tensor) -> Seen:
            mask, places = kwargs["attention_mask"], kwargs["position_embeddings"]
            found = recomputed_attention(module, states, places, mask, index, keys)
            visible, _ = visible_keys(mask, index, states.shape[1], found.shape[-1])
            return Seen(layer, found, visible)

        keep(layer, weights, states)

    with ExitStack() as stack:
        for layer in record:
            attention: Any = decoder[layer].self_attn
            handle = attention.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield record


def layer_numbers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Decoder layers from 0, in ascending order.

    Raises:
        ConfigurationError: one that does not exist, or none at all.
    """
    if layers is None:
        return list(range(depth))
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not len(layers):
        shown = f"layer {wrong[0]}" if wrong else "no layer"
        raise ConfigurationError(f"`layers` names {shown}; the decoder has layers 0 to {depth - 1}")
    return sorted({layer % depth for layer in layers})


def attentions_of(output: Any) -> tuple[Tensor, ...]:
    """The attention weights that a network returned with ``output_attentions=True``.

    Raises:
        CapabilityError: there are none; fused kernels return an empty tuple and no error.
    """
    found = getattr(output, "attentions", None)
    if not found:
        raise CapabilityError(
            "the network returned no attention weights, since its kernel does not form them; use "
            "recorded_attention, or load it with attn_implementation='eager'"
        )
    return tuple(found)


def _seen(call: AttentionCall, index: Tensor) -> Seen:
    """The weights of a call, by place in the sequence also where the cache has lost keys."""
    positions = getattr(call.cached, "positions", None)
    if positions is None:
        return Seen(call.layer, *call.weights(index))
    if call.mask is None or call.mask.shape[-1] == call.cached.get_seq_length():
        call = replace(call, mask=call.cached.fitted_mask(call.mask, call.query))
    weights, visible = call.weights(index)
    batch, heads, rows, _ = weights.shape
    place = positions.repeat_interleave(heads // positions.shape[1], dim=1)
    place = place[:, :, None].expand(-1, -1, rows, -1)
    shape = (batch, heads, rows, call.cached.get_seq_length())
    return Seen(
        call.layer,
        weights.new_zeros(shape).scatter(-1, place, weights),
        visible.new_zeros(shape).scatter(-1, place, visible.expand_as(weights)),
    )


def _reduced(weights: Callable[[Tensor], Seen], index: Tensor, reduce: Reduction) -> Any:
    if callable(reduce):
        return reduce(weights(index))
    if reduce == "none":
        return weights(index).weights
    if reduce == "heads":
        return weights(index).weights.mean(dim=1)
    total: Tensor | None = None
    seeing = torch.zeros(len(index), 1, device=index.device)
    for block in index.split(BLOCK, dim=1):
        seen = weights(block)
        part = seen.weights.mean(dim=1).sum(dim=1)
        total = part if total is None else total + part
        seeing += seen.visible.any(dim=-1).any(dim=1).sum(dim=1, keepdim=True)
    assert total is not None  # there is always a row
    return total / seeing.clamp(min=1)
