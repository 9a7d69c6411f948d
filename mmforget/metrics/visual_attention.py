"""How much of the decoder's attention goes to visual tokens, by layer and by generated token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mmforget.errors import ConfigurationError, DataError
from mmforget.models.multimodals.attention_tap import Seen, cache_of, recorded_attention
from mmforget.models.multimodals.base import family_of, unwrapped


class VisualMass(NamedTuple):
    """Attention on visual tokens by query row.

    Attributes:
        mass: (B, R) share of the attention, mean over heads.
        normalised: (B, R) `mass` over the share of visual tokens among those that the row sees; 1
            is attention spread evenly.
        defined: (B, R) bool; False where the row is padding or sees no visual token.
    """

    mass: Tensor
    normalised: Tensor
    defined: Tensor


def visual_mass(seen: Seen, visual: Tensor, sink: Tensor | None = None) -> VisualMass:
    """Sum the attention on visual tokens.

    ``mass = mean_h sum_{j in I} A[h, j]`` and ``normalised = mass / (|I| / visible)``, with I the
    visual tokens and `visible` the number of tokens that the row can see. Keys that the cache has
    lost count for neither.

    Args:
        seen: what a layer attended to.
        visual: (B, L') bool; places beyond L' are text.
        sink: (B,) place of the token that attracts idle attention, the first one. It is left out
            of I, of the number of tokens, and of the attention that is shared out. None keeps it.

    Raises:
        DataError: `visual` covers more places than there are.
    """
    weights, visible = seen.weights, seen.visible
    length = weights.shape[-1]
    if visual.shape[1] > length:
        raise DataError(
            f"layer {seen.layer} attends to {length} tokens, but `visual` covers "
            f"{visual.shape[1]}; measure without dropping tokens inside of the decoder, or only "
            "mask them"
        )
    visual = nn.functional.pad(visual, (0, length - visual.shape[1]))[:, None, None]
    total: Tensor | float = 1.0
    if sink is not None:
        first = (torch.arange(length, device=sink.device) == sink[:, None])[:, None, None]
        total = 1 - (weights * first).sum(dim=-1)
        visual, visible = visual & ~first, visible & ~first
    chosen = visible & visual
    mass = (weights * chosen).sum(dim=-1)
    if sink is not None:
        mass = mass / torch.as_tensor(total).clamp(min=torch.finfo(mass.dtype).tiny)
    mass = mass.mean(dim=1)
    share = (chosen.sum(dim=-1) / visible.sum(dim=-1).clamp(min=1)).mean(dim=1)
    defined = share > 0
    return VisualMass(mass, torch.where(defined, mass / share.clamp(min=1e-30), 0.0), defined)


class VisualAttentionResult(NamedTuple):
    """Mean attention on visual tokens. None stands where nothing was measured.

    Attributes:
        value: mean mass over samples, layers and tokens.
        normalised: the same, normalised.
        n: samples with visual tokens.
        per_sample: mean mass of each, in the order measured.
        table: per layer and generated token the mean mass.
        normalised_table: the same, normalised.
        by_layer: per layer the mean mass.
        by_token: per generated token the mean mass. Answers end at different tokens; later means
            are those of the longer ones.
        slope: change of `by_token` per token, by least squares; negative where the network looks
            away as it goes on.
    """

    value: float | None
    normalised: float | None
    n: int
    per_sample: list[float]
    table: list[list[float | None]]
    normalised_table: list[list[float | None]]
    by_layer: list[float | None]
    by_token: list[float | None]
    slope: float | None


class VisualAttention(Metric):
    """Attention mass on visual tokens while a network generates, by layer and generated token.

    The row that predicts a new token counts for that token. Rows without visual tokens and tokens
    after the end of an answer do not count.

    Args:
        layers: of the decoder.
        tokens: generated tokens to look at, at least 1; later ones are ignored.
        without_sink: leave out the first token, which attracts idle attention.

    Raises:
        ConfigurationError: a number below 1.

    Example:
        ```python
        metric = VisualAttention(layers=32, tokens=16)
        with metric.watch(model.network, end_ids=model.end_ids):
            model.answer(images, questions)
        print(metric.compute().by_layer)
        ```
    """

    full_state_update = False
    mass_sum: Tensor
    normalised_sum: Tensor
    count: Tensor
    samples: list[Tensor]

    def __init__(self, layers: int, tokens: int, without_sink: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("layers", layers), ("tokens", tokens)):
            if value < 1:
                raise ConfigurationError(f"`{name}` is {value}; it must be at least 1")
        self.layers, self.tokens, self.without_sink = layers, tokens, without_sink
        self.set_dtype(torch.float64)
        for state in ("mass_sum", "normalised_sum", "count"):
            zeros = torch.zeros(layers, tokens, dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")
        self.add_state("samples", [], dist_reduce_fx="cat")

    def update(self, mass: Tensor, normalised: Tensor, counted: Tensor) -> None:
        """Add a batch of answers.

        Args:
            mass: (B, layers, S) with S at most `tokens`.
            normalised: (B, layers, S).
            counted: (B, layers, S) bool, what is measured.
        """
        steps = mass.shape[-1]
        use = counted.to(self.device, torch.float64)
        mass, normalised = mass.to(use), normalised.to(use)
        self.mass_sum[:, :steps] += (mass * use).sum(dim=0)
        self.normalised_sum[:, :steps] += (normalised * use).sum(dim=0)
        self.count[:, :steps] += use.sum(dim=0)
        number = use.sum(dim=(1, 2))
        mean = (mass * use).sum(dim=(1, 2)) / number.clamp(min=1)
        self.samples.append(mean[number > 0])

    def compute(self) -> VisualAttentionResult:
        """Means over all answers."""
        # A state is a list before processes exchange it, and a tensor afterwards.
        empty = isinstance(self.samples, list) and not self.samples
        samples = torch.zeros(0) if empty else dim_zero_cat(self.samples)
        by_token = _means(self.mass_sum.sum(dim=0), self.count.sum(dim=0))
        return VisualAttentionResult(
            value=_means(self.mass_sum.sum()[None], self.count.sum()[None])[0],
            normalised=_means(self.normalised_sum.sum()[None], self.count.sum()[None])[0],
            n=len(samples),
            per_sample=samples.tolist(),
            table=[_means(*rows) for rows in zip(self.mass_sum, self.count, strict=True)],
            normalised_table=[
                _means(*rows) for rows in zip(self.normalised_sum, self.count, strict=True)
            ],
            by_layer=_means(self.mass_sum.sum(dim=1), self.count.sum(dim=1)),
            by_token=by_token,
            slope=_slope(by_token),
        )

    @contextmanager
    def watch(self, network: nn.Module, end_ids: Collection[int] | None = None) -> Iterator[None]:
        """Measure every call of ``generate`` in a block; its outputs stay the same.

        Prompts must be padded on the left, and generated with a cache and without beams. Works
        together with `mmforget.retention.kv_eviction.KVEviction`, and with reducers that drop
        tokens before the decoder; those that drop them inside of it need ``mode="mask"``, under
        which the attention is the same.

        Args:
            network: of a supported family, maybe wrapped by peft.
            end_ids: tokens that end an answer; None takes those of the generation settings.

        Raises:
            ConfigurationError: the network has another number of layers, or, in the block, is
                called without ids or without a cache.
        """
        base: Any = unwrapped(network)
        family = family_of(network)
        depth = len(family.layers(base))
        if depth != self.layers:
            raise ConfigurationError(
                f"`layers` is {self.layers}, but the network's decoder has {depth}"
            )
        if end_ids is None:
            found = base.generation_config.eos_token_id
            end_ids = found if isinstance(found, list | tuple) else [found]
        ends = torch.tensor([one for one in end_ids if one is not None], dtype=torch.long)
        answers = _Answers(self, ends)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None or kwargs.get("use_cache") is False:
                raise ConfigurationError(
                    "visual attention is measured with `input_ids` and a cache; call `generate` "
                    "with both"
                )
            cache = cache_of(kwargs)
            if cache is None or cache.get_seq_length() == 0:
                mask = kwargs.get("attention_mask")
                mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(ids)
                answers.begin(family.visual_mask(base, ids), mask.long().argmax(dim=1))
            elif ids.shape[1] == 1:
                answers.go_on(ids)
            else:
                raise ConfigurationError(
                    f"{ids.shape[1]} tokens came to a cache that is not empty; visual attention "
                    "is measured from a whole prompt on, without `prefill_chunk_size`, assistant "
                    "and earlier turns"
                )

        with ExitStack() as stack:
            inner = base.get_submodule("model")
            handle = inner.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            handle = inner.register_forward_hook(lambda *_: answers.end_pass())
            stack.callback(handle.remove)
            stack.enter_context(recorded_attention(network, reduce=answers.see))
            yield
            answers.flush()


class _Answers:
    """The answers of one call of ``generate``, collected pass by pass."""

    def __init__(self, metric: VisualAttention, ends: Tensor) -> None:
        self.metric, self.ends = metric, ends
        self.passes: list[tuple[Tensor, Tensor, Tensor]] = []
        self.masses: list[VisualMass] = []

    def begin(self, visual: Tensor, sink: Tensor) -> None:
        """A prompt is read."""
        self.flush()
        self.visual = visual
        self.sink = sink if self.metric.without_sink else None
        self.going = torch.ones(len(visual), dtype=torch.bool, device=visual.device)

    def go_on(self, ids: Tensor) -> None:
        """The last tokens are read."""
        self.going = self.going & ~torch.isin(ids, self.ends.to(ids.device)).any(dim=1)

    def see(self, seen: Seen) -> None:
        """A layer attends."""
        if len(self.passes) < self.metric.tokens:
            self.masses.append(visual_mass(seen, self.visual, self.sink))

    def end_pass(self) -> None:
        """All layers are through."""
        if self.masses:
            mass, normalised, defined = (
                torch.cat(part, dim=1) for part in zip(*self.masses, strict=True)
            )
            self.passes.append((mass, normalised, defined & self.going[:, None]))
        self.masses = []

    def flush(self) -> None:
        """Hand the answers over."""
        if self.passes:
            self.metric.update(
                *(torch.stack(part, dim=-1) for part in zip(*self.passes, strict=True))
            )
        self.passes, self.masses = [], []


def _means(total: Tensor, count: Tensor) -> list[float | None]:
    return [one / n if n else None for one, n in zip(total.tolist(), count.tolist(), strict=True)]


def _slope(values: Sequence[float | None]) -> float | None:
    points = [(float(place), value) for place, value in enumerate(values) if value is not None]
    if len(points) < 2:
        return None
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
