"""What visual tokens cost: operations and memory by count, and time as measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmforget.errors import ConfigurationError
from mmforget.models.multimodals.base import Inputs, family_of, unwrapped
from mmforget.retention.token_reduction import TokenReducer


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a language model that its cost depends on.

    Attributes:
        layers: number of decoder layers.
        width: D of the hidden states.
        query_width: heads times their width.
        key_width: key heads times their width.
        inner: width inside of the gated MLP.
    """

    layers: int
    width: int
    query_width: int
    key_width: int
    inner: int

    @classmethod
    def of(cls, network: nn.Module) -> DecoderShape:
        """Read the sizes off a network of a supported family, maybe wrapped by peft."""
        base = unwrapped(network)
        layers = family_of(base).layers(base)
        first: Any = layers[0]
        query, inner = first.self_attn.q_proj, first.mlp.up_proj
        return cls(
            len(layers),
            int(query.in_features),
            int(query.out_features),
            int(first.self_attn.k_proj.out_features),
            int(inner.out_features),
        )

    def lengths(self, tokens: int, kept: int, layer: int = 0) -> list[int]:
        """Tokens in each layer: `tokens` before layer `layer`, `kept` from there on.

        Args:
            tokens: of the prompt, text included.
            kept: what is left of them, text included.
            layer: 0 where tokens are taken out before the language model.
        """
        return [tokens if number < layer else kept for number in range(self.layers)]

    def prefill_flops(self, lengths: Sequence[int]) -> int:
        r"""Operations on a prompt, a multiplication and its addition counted as two.

        Per layer of n tokens: :math:`4nDD_q + 4nDD_{kv}` for the projections,
        :math:`4n^2D_q` for scores and weighted values (no half off for causality, as kernels
        mostly form the whole square), and :math:`6nDD_{ff}` for the gated MLP. Tower, head, norms
        and the choice of tokens are not counted.

        Args:
            lengths: tokens in each layer; see `lengths`.
        """
        return sum(n * self._per_token() + 4 * n * n * self.query_width for n in lengths)

    def decode_flops(self, lengths: Sequence[int], new_tokens: int = 1) -> int:
        """Operations of generating tokens after the first one, each of which attends to all before.

        Args:
            lengths: tokens of the prompt in each layer.
            new_tokens: number of passes of one token.
        """
        seen = sum(sum(n + step for step in range(1, new_tokens + 1)) for n in lengths)
        return new_tokens * self.layers * self._per_token() + 4 * seen * self.query_width

    def cache_bytes(self, lengths: Sequence[int], number_bytes: int = 2) -> int:
        """Size of keys and values of a prompt.

        Args:
            lengths: tokens in each layer.
            number_bytes: of one number; 2 for bfloat16.
        """
        return sum(2 * self.key_width * n * number_bytes for n in lengths)

    def _per_token(self) -> int:
        attention = 4 * self.width * (self.query_width + self.key_width)
        return attention + 6 * self.width * self.inner


@dataclass(frozen=True)
class Latency:
    """Times of one task.

    Attributes:
        seconds: the median.
        all: every measured time, warm-ups left out.
        threads: of torch on the CPU.
        peak_bytes: most memory that tensors took on a CUDA device; None elsewhere.
    """

    seconds: float
    all: tuple[float, ...]
    threads: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class GenerationLatency:
    """Times of generation for one batch.

    Attributes:
        prefill: until the first token is there; tower and choice of tokens included.
        total: until the last one.
        per_token: of each further token, from the medians of both; None if there was only one.
    """

    prefill: Latency
    total: Latency
    per_token: float | None


def measured_latency(
    tasks: Mapping[str, Callable[[], object]], repeats: int = 5, warmups: int = 2
) -> dict[str, Latency]:
    """Time tasks in turns, so that what else the machine does meets all of them alike.

    Args:
        tasks: name -> what to run; each is run `warmups` + `repeats` times.
        repeats: measured runs, at least 1; five or more for figures that are published.
        warmups: runs before, not counted.

    Raises:
        ConfigurationError: nothing to measure.
    """
    if repeats < 1 or warmups < 0 or not tasks:
        raise ConfigurationError(
            f"`repeats` is {repeats}, `warmups` {warmups} and there are {len(tasks)} tasks; at "
            "least one run of one task is needed"
        )
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    peaks: dict[str, int] = dict.fromkeys(tasks, 0)
    for turn in range(warmups + repeats):
        for name, task in tasks.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            task()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            if turn >= warmups:
                times[name].append(time.perf_counter() - start)
    return {
        name: Latency(
            statistics.median(found),
            tuple(found),
            torch.get_num_threads(),
            peaks[name] if cuda else None,
        )
        for name, found in times.items()
    }


def generation_latency(
    network: Any,
    inputs: Inputs,
    reducers: Mapping[str, TokenReducer | None],
    new_tokens: int = 16,
    repeats: int = 5,
    warmups: int = 2,
) -> dict[str, GenerationLatency]:
    """Time greedy generation with and without fewer visual tokens, on the same batch.

    Every row gets `new_tokens` tokens, whatever it says.

    Args:
        network: of transformers, maybe wrapped by peft.
        inputs: of one batch, padded at the left.
        reducers: name -> how to spare tokens; None for none.
        new_tokens: of every row, at least 1.
        repeats: see `measured_latency`.
        warmups: see `measured_latency`.
    """
    counts = sorted({1, new_tokens})
    tasks: dict[str, Callable[[], object]] = {
        f"{name}/{count}": _generation(network, inputs, reducer, count)
        for name, reducer in reducers.items()
        for count in counts
    }
    times = measured_latency(tasks, repeats, warmups)
    found = {}
    for name in reducers:
        first, total = times[f"{name}/1"], times[f"{name}/{new_tokens}"]
        further = (total.seconds - first.seconds) / (new_tokens - 1) if new_tokens > 1 else None
        found[name] = GenerationLatency(first, total, further)
    return found


def _generation(
    network: Any, inputs: Inputs, reducer: TokenReducer | None, number: int
) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad(), reducer.on(network) if reducer else nullcontext():
            given = reducer.reduced(network, inputs) if reducer else dict(inputs)
            known = family_of(network).model_inputs(given)
            return network.generate(
                **known, do_sample=False, max_new_tokens=number, min_new_tokens=number
            )

    return run
