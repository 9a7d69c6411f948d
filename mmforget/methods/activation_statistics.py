"""How strongly the inputs of layers are used while pictures are drawn: sums of squares per input.

The numbers are collected by pre-hooks during ordinary sampling and added up in place, so that the
memory they take does not grow with the number of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.errors import (
    ConfigurationError,
    DivergenceError,
    ModelError,
    RequestError,
    WeightsError,
    suggest,
)
from mmforget.methods.closed_form import precise_dtype
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.memory_layers import MemoryLayer
from mmforget.seeds import generator

RowChoice = Literal["conditional", "all"]

TINY = 1e-24
"""Smallest squared norm that a row is divided by."""


@dataclass
class ActivationStatistics:
    """Sums of squared inputs per layer and sampling time.

    Attributes:
        squares: per layer name and time a (width,) tensor: the sum over rows of squared inputs,
            of rows of length one unless the settings say otherwise. Times are in the scheduler's
            units and come in the order of sampling.
        rows: number of rows (tokens) behind each of these sums.
        passes: evaluations of the denoiser, one per picture and prompt.
        settings: what shaped the numbers, plain data.
    """

    squares: dict[str, dict[float, Tensor]]
    rows: dict[str, dict[float, int]]
    passes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def times(self) -> tuple[float, ...]:
        """Sampling times, the noisiest first."""
        return tuple(next(iter(self.squares.values())))

    def size(self, layer: str, time: float, average: bool = True) -> Tensor:
        """How strongly each input of a layer was used, (width,).

        Args:
            layer: its name.
            time: one of `times`.
            average: the root mean square over rows; False gives the root of the sum, which grows
                with the number of rows.
        """
        total = self.squares[layer][time]
        return (total / self.rows[layer][time] if average else total).sqrt()

    def mean_square(self, layer: str, times: Sequence[float]) -> Tensor:
        """Mean of squared inputs over rows, averaged over times, (width,)."""
        own, rows = self.squares[layer], self.rows[layer]
        return torch.stack([own[time] / rows[time] for time in times]).mean(0)

    def check_against(self, base: ActivationStatistics) -> None:
        """Refuse a base that cannot be compared with these numbers.

        Raises:
            WeightsError: it lacks a layer, or has another width there.
            ConfigurationError: it lacks a time.
        """
        for layer, own in self.squares.items():
            theirs = base.squares.get(layer)
            if theirs is None:
                raise WeightsError(
                    f"the base statistics lack the layer '{layer}'; collect both on the same "
                    "layers of the same network"
                )
            for time, total in own.items():
                if time not in theirs:
                    raise ConfigurationError(
                        f"the base statistics of '{layer}' lack the time {time:g}; collect both "
                        "with the same sampler and the same `steps`"
                    )
                if theirs[time].shape != total.shape:
                    raise WeightsError(
                        f"'{layer}' has {len(total)} inputs, in the base statistics "
                        f"{len(theirs[time])}; collect both on the same network"
                    )


def collect(
    model: DiffusionGenerator,
    prompts: Sequence[str] | PromptEmbedding,
    layers: Sequence[MemoryLayer],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    first_steps: int | None = None,
    seed: int = 0,
    rows: RowChoice = "conditional",
    row_norm: bool = True,
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
) -> ActivationStatistics:
    """Draw one picture per prompt and add up the squared inputs of layers.

    Args:
        model: what draws; it is left as it is.
        prompts: texts, or embeddings of N prompts.
        layers: see `mmforget.models.memory_layers`.
        steps: sampling steps, by default the model's.
        guidance: guidance scale, by default the model's.
        first_steps: sampling ends after so many times, which are the noisiest; None takes all.
        seed: of the starting noise.
        rows: ``conditional`` counts only the rows of the batch that read the prompts; ``all`` also
            those that read the empty text, as public code of the papers does.
        row_norm: divide every row by its length first, so that no token outweighs the others.
        batch_size: pictures at a time.
        numbers: N numbers of the starting noises; prompts with equal numbers start from the same
            noise. By default 0 to N - 1, so that two lists of prompts start from the same noises.

    Returns:
        Statistics pooled over the prompts, on the device of the model.

    Raises:
        RequestError: no prompts, or one that is too long.
        ConfigurationError: a number out of range.
        DivergenceError: an input that is not finite.
        ModelError: a layer that is never called, or half precision on the CPU.

    Reference:
        Chavhan et al., ConceptPrune, 2024, arXiv 2405.19237; Sun et al., Wanda, 2023,
        arXiv 2306.11695.
    """
    course = _Course(steps, guidance, first_steps, seed, rows, row_norm, batch_size, numbers)
    watch = _Watch(layers, course, each=False)
    for _ in _sampled(model, prompts, course, watch):
        pass
    (found,) = watch.found(model)
    return found


def collect_each(
    model: DiffusionGenerator,
    prompts: Sequence[str] | PromptEmbedding,
    layers: Sequence[MemoryLayer],
    **settings: Any,
) -> Iterator[ActivationStatistics]:
    """The same as `collect`, but prompt by prompt; no more than a batch is held at a time.

    Args:
        model: what draws; it is left as it is.
        prompts: texts, or embeddings of N prompts.
        layers: see `mmforget.models.memory_layers`.
        settings: the further arguments of `collect`; `rows` must be ``conditional``, since the
            others do not belong to one prompt.

    Yields:
        Statistics of one prompt after the other.
    """
    course = _Course(**settings)
    if course.rows != "conditional":
        raise ConfigurationError(
            f"`rows` is '{course.rows}', prompt by prompt it must be 'conditional', because the "
            "other rows do not belong to one prompt"
        )
    watch = _Watch(layers, course, each=True)
    for _ in _sampled(model, prompts, course, watch):
        yield from watch.found(model)
        watch.clear()


@dataclass(frozen=True)
class _Course:
    """The settings of `collect`, checked as far as they can be without a model."""

    steps: int | None = None
    guidance: float | None = None
    first_steps: int | None = None
    seed: int = 0
    rows: RowChoice = "conditional"
    row_norm: bool = True
    batch_size: int = 32
    numbers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.rows not in get_args(RowChoice):
            raise ConfigurationError(
                f"`rows` is '{self.rows}', {suggest(self.rows, get_args(RowChoice))}"
            )
        if self.batch_size < 1:
            raise ConfigurationError(f"`batch_size` is {self.batch_size}, it must be at least 1")

    def plain(self, model: DiffusionGenerator) -> dict[str, Any]:
        """As plain data, with the model's defaults filled in."""
        steps = model.steps if self.steps is None else self.steps
        return {
            "steps": steps,
            "guidance": model.guidance if self.guidance is None else self.guidance,
            "first_steps": check_first_steps(self.first_steps, steps),
            "seed": self.seed,
            "rows": self.rows,
            "row_norm": self.row_norm,
        }


def check_first_steps(first_steps: int | None, steps: int) -> int:
    """The number of sampling steps that are looked at.

    Args:
        first_steps: None for all.
        steps: sampling steps.

    Raises:
        ConfigurationError: out of range.
    """
    if first_steps is None:
        return steps
    if not 1 <= first_steps <= steps:
        raise ConfigurationError(
            f"`first_steps` is {first_steps}, it must be 1 to {steps}, the number of sampling steps"
        )
    return first_steps


class _Enough(Exception):
    """Ends sampling after the last time that is wanted; caught by `_sampled`."""


class _Watch:
    """Pre-hooks that add up, and the sums.

    Args:
        layers: what is watched.
        course: see `collect`.
        each: keep one sum per row of the batch instead of one for all.
    """

    def __init__(self, layers: Sequence[MemoryLayer], course: _Course, each: bool) -> None:
        if not layers:
            raise ConfigurationError("`layers` is empty; choose them with `memory_layers(model)`")
        self.layers, self.course, self.each = list(layers), course, each
        self.limit: int | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all sums."""
        self.sums: dict[str, dict[float, Tensor]] = {layer.name: {} for layer in self.layers}
        self.counts: dict[str, dict[float, int]] = {layer.name: {} for layer in self.layers}
        self.times: dict[float, None] = {}
        self.passes = 0

    def before(self, time: float, rows: slice) -> None:
        """Note which time and rows the next pass belongs to."""
        if time not in self.times:
            if len(self.times) == self.limit:
                raise _Enough
            self.times[time] = None
        self.time = time
        self.rows = rows if self.course.rows == "conditional" else slice(None)
        self.passes += rows.stop

    def hook(self, layer: MemoryLayer) -> Callable[[Any, tuple[Any, ...]], None]:
        """A forward pre-hook."""
        part = None if layer.width == layer.module.in_features else layer.columns

        def watch(module: Any, arguments: tuple[Any, ...]) -> None:
            inputs: Tensor = arguments[0][self.rows]
            if part is not None:
                inputs = inputs[..., part]
            squares = inputs.float().square()
            if self.each:
                squares = squares.reshape(len(squares), -1, squares.shape[-1])
            else:
                squares = squares.reshape(1, -1, squares.shape[-1])
            if self.course.row_norm:
                # The sum of squares of rows of length one is a product of one vector and a matrix.
                weights = squares.sum(2, keepdim=True).clamp_(min=TINY).reciprocal_()
                total = torch.bmm(weights.mT, squares)[:, 0]
            else:
                total = squares.sum(1)
            sums, counts = self.sums[layer.name], self.counts[layer.name]
            if self.time in sums:
                sums[self.time] += total
                counts[self.time] += squares.shape[1]
            else:
                sums[self.time] = total.to(precise_dtype(total.device))
                counts[self.time] = squares.shape[1]

        return watch

    def check_called(self) -> None:
        """Refuse layers whose hooks did not fire.

        Raises:
            ModelError: names one.
        """
        for name, counts in self.counts.items():
            if not counts:
                raise ModelError(
                    f"the layer '{name}' was never called while a picture was drawn; the denoiser "
                    "may be compiled or its projections fused, give it as it was loaded"
                )

    def found(self, model: DiffusionGenerator) -> list[ActivationStatistics]:
        """The sums so far, one entry in all or one per row of the batch.

        Raises:
            DivergenceError: a sum that is not finite.
        """
        for name, sums in self.sums.items():
            finite = torch.stack(list(sums.values())).isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                time = list(sums)[finite.index(False)]
                raise DivergenceError(
                    f"the inputs of '{name}' are not finite at time {time:g}; in half precision "
                    "they overflow, load the model with `torch_dtype=torch.float32` or in bfloat16"
                )
        count = len(next(iter(next(iter(self.sums.values())).values())))
        return [
            ActivationStatistics(
                {
                    name: {time: t[row] for time, t in sums.items()}
                    for name, sums in self.sums.items()
                },
                {name: dict(counts) for name, counts in self.counts.items()},
                self.passes // count,
                self.course.plain(model),
            )
            for row in range(count)
        ]


@torch.no_grad()
def _sampled(
    model: DiffusionGenerator,
    prompts: Sequence[str] | PromptEmbedding,
    course: _Course,
    watch: _Watch,
) -> Iterator[None]:
    """Sample batch by batch under the eyes of a watch; yields after each batch."""
    settings = course.plain(model)
    # Without a wish there is no limit: some samplers visit more times than they have steps.
    watch.limit = course.first_steps
    if not len(prompts):
        raise RequestError("there are no prompts to collect statistics on; give at least one")
    numbers = list(range(len(prompts)) if course.numbers is None else course.numbers)
    if len(numbers) != len(prompts):
        raise ConfigurationError(
            f"`numbers` has {len(numbers)} entries for {len(prompts)} prompts; give one for each"
        )
    model.require_full_precision("collecting statistics")
    if not isinstance(prompts, PromptEmbedding):
        model.check_length(prompts)
    empty = model.unconditional()
    for start in range(0, len(prompts), course.batch_size):
        own = prompts[start : start + course.batch_size]
        keys = numbers[start : start + course.batch_size]
        draws = [generator(course.seed, "locating", key) for key in keys]
        noise = torch.stack([torch.randn(model.latent_shape, generator=d) for d in draws])
        guidance = settings["guidance"]
        if isinstance(own, PromptEmbedding):
            embedding = own
        elif any(own):
            embedding = model.encode(own)
        else:
            blank = model.encode([""])
            embedding = PromptEmbedding.cat([blank] * len(keys))
            if course.rows == "conditional" and _leads_nowhere(model, blank, empty):
                guidance = 1.0
        with _watched(model, watch), suppress(_Enough):
            model.sample(
                noise.to(empty.states),
                embedding,
                empty,
                steps=settings["steps"],
                guidance=guidance,
                draws=[generator(course.seed, "locating sampler", key) for key in keys],
                before=watch.before,
            )
        watch.check_called()
        yield


def _leads_nowhere(
    model: DiffusionGenerator, blank: PromptEmbedding, empty: PromptEmbedding
) -> bool:
    """Whether guidance of the empty text has nothing to do, so that a pass can be saved."""
    if model.distilled or model.guider is not None or not torch.equal(blank.states, empty.states):
        return False
    if blank.pooled is None or empty.pooled is None:
        return True
    return torch.equal(blank.pooled, empty.pooled)


@contextmanager
def _watched(model: DiffusionGenerator, watch: _Watch) -> Iterator[None]:
    """Hooks on, eval mode; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for layer in watch.layers:
            handle = layer.module.register_forward_pre_hook(watch.hook(layer))
            stack.callback(handle.remove)
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
