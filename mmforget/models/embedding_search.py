"""Search for prompt embeddings under which a model denoises given pictures best."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.models.base import PromptEmbedding, frozen
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator

logger = logging.getLogger(__name__)

Init = Literal["random", "trigger", "ordinary"]
"""Where a search starts: from noise, from the prompt that once drew the picture, or from one that
never did."""

Tokens = Literal["all", "non_special"]

USUAL_SPREAD = 1.0
"""Standard deviation of prompt embeddings for which published learning rates are meant."""

CHECK_DRAWS = 32
"""Draws of noise and time on which restarts are compared."""

CHECK_EVERY = 10
"""Steps between looks at whether the losses are still finite."""


@dataclass(frozen=True)
class EmbeddingSearch:
    """How prompt embeddings are searched.

    Args:
        budgets: numbers of steps after which a snapshot is kept; 0 is the start itself.
        batch_size: draws of noise and time per picture and step.
        lr: learning rate of Adam, for embeddings of standard deviation 1; it grows and shrinks
            with the model's (`EmbeddingScale`).
        init: see `Init`; random starts have the model's own standard deviation.
        tokens: ``all`` frees every position; ``non_special`` leaves begin, end and padding as they
            are for the prompt that the search starts from, for a random start all positions but
            those before the text.
        pooled: free the pooled embedding as well, where the family has one. Else it stays that of
            the prompt the search starts from, for a random start that of the empty text.
        times: part of the noise levels that is drawn from, (0, 1) for all.
        restarts: searches per picture, of which the one with the smallest loss is kept, snapshot
            by snapshot; more than 1 needs a random start, or several ordinary prompts.
        max_rows: rows of the network's batch at most; it bounds the memory and changes no result
            beyond rounding.
        checkpointing: compute activations again in the backward pass, which saves memory.
        seed: of start, noise and times.

    Raises:
        ConfigurationError: a setting out of range.
    """

    budgets: tuple[int, ...] = (0, 10, 25, 50, 100)
    batch_size: int = 8
    lr: float = 0.1
    init: Init = "random"
    tokens: Tokens = "all"
    pooled: bool = False
    times: tuple[float, float] = (0.0, 1.0)
    restarts: int = 1
    max_rows: int = 256
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(sorted(set(self.budgets))))
        if not self.budgets or self.budgets[0] < 0:
            raise ConfigurationError(
                f"`budgets` are {list(self.budgets)}; give numbers of steps, 0 or more"
            )
        for name in ("batch_size", "restarts", "max_rows"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"`{name}` is {getattr(self, name)}, it must be at least 1"
                )
        if not self.lr > 0:
            raise ConfigurationError(f"`lr` is {self.lr}, it must be above 0")
        for name, value, valid in (
            ("init", self.init, get_args(Init)),
            ("tokens", self.tokens, get_args(Tokens)),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        low, high = self.times
        if not 0 <= low < high <= 1:
            raise ConfigurationError(
                f"`times` are {low:g} and {high:g}; the first must be below the second, both "
                "between 0 and 1"
            )
        if self.restarts > 1 and self.init == "trigger":
            raise ConfigurationError(
                f"`restarts` is {self.restarts}, but a search from the trigger always starts at "
                "the same place; use 1, or `init='random'`"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        plain = asdict(self)
        return plain | {"budgets": list(self.budgets), "times": list(self.times)}


@dataclass(frozen=True)
class EmbeddingScale:
    """How large the prompt embeddings of a model are.

    Attributes:
        states: (L,) standard deviation at each position, one value per text encoder; 0 where an
            encoder is missing, whose positions hold zeros and stay so.
        pooled: of pooled embeddings, None where the family has none.
    """

    states: Tensor
    pooled: float | None = None

    @property
    def learning_rate(self) -> float:
        """What learning rates are multiplied by, for the report; the mean over encoders in use."""
        return float(self.states[self.states > 0].mean()) / USUAL_SPREAD


@torch.no_grad()
def embedding_scale(model: DiffusionGenerator, prompts: Sequence[str] = ()) -> EmbeddingScale:
    """Measure how large prompt embeddings are, so that steps have the same effect in all models.

    Args:
        model: whose text encoders.
        prompts: ordinary texts; the empty one is always among them.
    """
    texts = list(dict.fromkeys(["", *prompts]))
    embedding = model.encode(texts)
    states = embedding.states.float()
    used = states.abs().sum(dim=(0, 2)) > 0
    spread = states[:, used].std() * used
    for part in model.segments(texts[:1]):
        own = slice(part.start, part.start + part.ids.shape[1])
        if bool(used[own].any()):
            spread[own] = states[:, own].std()
    pooled = embedding.pooled
    return EmbeddingScale(spread, None if pooled is None else float(pooled.float().std()))


def row_keys(images: Tensor) -> list[str]:
    """A name for every picture, the same whatever other pictures are around it.

    Args:
        images: (N, 3, H, W) float in [0, 1].

    Returns:
        N texts, all different: equal pictures are numbered.
    """
    seen: dict[str, int] = {}
    keys = []
    for image in images:
        levels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
        digest = hashlib.blake2b(levels.numpy().tobytes(), digest_size=8).hexdigest()
        seen[digest] = seen.get(digest, -1) + 1
        keys.append(f"{digest}-{seen[digest]}")
    return keys


@torch.no_grad()
def starting_embeddings(
    model: DiffusionGenerator,
    images: Tensor,
    settings: EmbeddingSearch,
    triggers: Sequence[str] | None = None,
    ordinary: Sequence[str] | None = None,
    scale: EmbeddingScale | None = None,
) -> tuple[PromptEmbedding, Tensor]:
    """Make the embeddings that a search starts from.

    Args:
        model: whose text encoders.
        images: (N, 3, H, W) pictures; they only key the draws.
        settings: `init`, `tokens` and `seed` matter.
        triggers: N prompts, for ``init="trigger"``.
        ordinary: prompts to choose from, for ``init="ordinary"``.
        scale: by default measured on the given prompts.

    Returns:
        N starts in single precision, and (N, L) bool: the positions that are free.

    Raises:
        ConfigurationError: the prompts that `init` needs are missing.
        RequestError: a prompt is too long.
    """
    scale = scale or embedding_scale(model, [*(triggers or ()), *(ordinary or ())])
    keys = row_keys(images)
    if settings.init == "trigger":
        if triggers is None or len(triggers) != len(images):
            raise ConfigurationError(
                f"`init` is 'trigger', but there are {len(triggers or ())} triggers for "
                f"{len(images)} pictures; give one prompt per picture"
            )
        texts = list(triggers)
    elif settings.init == "ordinary":
        if not ordinary:
            raise ConfigurationError(
                "`init` is 'ordinary', but there are no ordinary prompts; give some, or use "
                "`init='random'`"
            )
        draws = [generator(settings.seed, "embedding-search-prompt", key) for key in keys]
        texts = [ordinary[int(torch.randint(len(ordinary), (1,), generator=d))] for d in draws]
    else:
        texts = [""] * len(images)
    distinct = list(dict.fromkeys(texts))
    place = {text: row for row, text in enumerate(distinct)}
    found = model.encode(distinct)[[place[text] for text in texts]]
    states = found.states.float()
    pooled = None if found.pooled is None else found.pooled.float()
    free = torch.ones(states.shape[:2], dtype=torch.bool)
    if settings.tokens == "non_special":
        free = torch.zeros_like(free)
        for part in model.segments(texts):
            content = part.content.clone()
            if settings.init == "random":
                content[:, part.begin :] = True
            free[:, part.start : part.start + content.shape[1]] = content
    free = free.to(states.device)
    if settings.init == "random":
        draws = [generator(settings.seed, "embedding-search-start", key) for key in keys]
        noise = torch.stack([torch.randn(states.shape[1:], generator=draw) for draw in draws])
        noise = noise.to(states.device) * scale.states.to(states.device)[:, None]
        states = torch.where(free[..., None], noise, states)
        if pooled is not None and settings.pooled:
            noise = torch.stack([torch.randn(pooled.shape[1:], generator=draw) for draw in draws])
            pooled = noise.to(pooled.device) * (scale.pooled or 1.0)
    return PromptEmbedding(states, pooled), free


def search_embeddings(
    model: DiffusionGenerator,
    images: Tensor,
    *,
    settings: EmbeddingSearch | None = None,
    triggers: Sequence[str] | None = None,
    ordinary: Sequence[str] | None = None,
    regions: Tensor | None = None,
    start: PromptEmbedding | None = None,
    scale: EmbeddingScale | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[int, PromptEmbedding]:
    r"""Look for the prompt embeddings under which a model denoises pictures best.

    Minimises :math:`E_{\epsilon,t}\,\|f_\theta(x_t, t, y) - f^*(x, \epsilon, t)\|^2` over the
    embedding :math:`y` of each picture :math:`x` with Adam, with noise and times drawn anew in
    every step; `f` is the raw output of the network and `f*` what it should be. There is no
    guidance and no bound on `y`. All pictures are searched at once, in one pass per step, and one
    run gives the snapshots of all budgets. A picture's result does not depend on the others, up to
    rounding. The weights stay as they are and get no gradients.

    Args:
        model: the model under attack.
        images: (N, 3, H, W) float in [0, 1], of the model's size.
        settings: by default those of `EmbeddingSearch`.
        triggers: N prompts, for ``init="trigger"``.
        ordinary: prompts, for ``init="ordinary"``.
        regions: (N, H, W) bool, the part of each picture that counts; None for all of it.
        start: N embeddings to start from, instead of those of `settings.init`; all positions are
            free then.
        scale: by default measured on the given prompts. Searches that are compared need the same.
        progress: called with the number of steps done after every step.

    Returns:
        Per budget N embeddings, in single precision. If the losses stop being finite, the budgets
        reached before, and a warning is logged.

    Raises:
        ConfigurationError: the prompts that `init` needs are missing.
        DataError: pictures, regions or starts of a wrong shape.
        RequestError: a prompt is too long.
        ModelError: half precision on the CPU.

    Reference:
        Kowalczuk, Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, Finding DoRI: Discovery of
        Retained Images in Diffusion Models, 2025, arXiv 2507.16880. As reported, it takes
        50 steps of batch 8 with learning rate 0.1.
    """
    settings = settings or EmbeddingSearch()
    _check_pictures(images, regions, start)
    model.require_full_precision("an embedding search")
    scale = scale or embedding_scale(model, [*(triggers or ()), *(ordinary or ())])
    repeated = images.repeat_interleave(settings.restarts, 0)
    with frozen(model), _checkpointed(model, settings.checkpointing):
        latents = model.to_latents(images.to(next(model.network.parameters()).device)).float()
        if tuple(latents.shape[1:]) != model.latent_shape:
            raise DataError(
                f"`images` have shape {tuple(images.shape)}, whose latents are "
                f"{tuple(latents.shape[1:])} instead of {model.latent_shape}; resize the images"
            )
        weight = torch.ones_like(latents[:, :1])
        if regions is not None:
            weight = F.adaptive_avg_pool2d(regions[:, None].to(latents), model.latent_shape[1:])
        if start is None:
            begin, free = starting_embeddings(
                model,
                repeated,
                settings,
                None
                if triggers is None
                else [t for t in triggers for _ in range(settings.restarts)],
                ordinary,
                scale,
            )
        else:
            rows = torch.arange(len(images)).repeat_interleave(settings.restarts)
            begin = start[rows.to(start.states.device)]
            free = torch.ones(begin.states.shape[:2], dtype=torch.bool)
        search = _Search(
            model,
            settings,
            latents.repeat_interleave(settings.restarts, 0),
            weight.repeat_interleave(settings.restarts, 0),
            begin,
            free,
            scale,
            row_keys(repeated),
        )
        return search.run(progress)


def _check_pictures(images: Tensor, regions: Tensor | None, start: PromptEmbedding | None) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(
            f"`images` has shape {tuple(images.shape)}, it must be (N, 3, H, W) with N above 0"
        )
    if regions is not None and (
        regions.dtype != torch.bool or regions.shape != (len(images), *images.shape[2:])
    ):
        raise DataError(
            f"`regions` is {tuple(regions.shape)} {regions.dtype}; it must be "
            f"{(len(images), *images.shape[2:])} bool"
        )
    if start is not None and len(start) != len(images):
        raise DataError(
            f"`start` has {len(start)} embeddings for {len(images)} pictures; give one per picture"
        )


@contextmanager
def _checkpointed(model: DiffusionGenerator, wanted: bool) -> Iterator[None]:
    network = model.network
    if not wanted or network.is_gradient_checkpointing:
        yield
        return
    network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


class _Search:
    """One run over R rows, the restarts of one picture in a row.

    What Adam moves are offsets in units of the scale: its steps do not depend on the size of a
    gradient, so that one learning rate suits positions of different sizes.
    """

    def __init__(
        self,
        model: DiffusionGenerator,
        settings: EmbeddingSearch,
        latents: Tensor,
        weight: Tensor,
        begin: PromptEmbedding,
        free: Tensor,
        scale: EmbeddingScale,
        keys: Sequence[str],
    ) -> None:
        self.model, self.settings, self.latents, self.weight = model, settings, latents, weight
        self.keys = keys
        device = latents.device
        self.begin = begin.states.detach().float().to(device)
        self.scale = (free.to(device) * scale.states.to(device))[..., None] / USUAL_SPREAD
        self.offset = torch.zeros_like(self.begin)
        self.begin_pooled = None
        self.offset_pooled = None
        if begin.pooled is not None:
            self.begin_pooled = begin.pooled.detach().float().to(device)
            if settings.pooled:
                self.offset_pooled = torch.zeros_like(self.begin_pooled)
                self.pooled_scale = (scale.pooled or 1.0) / USUAL_SPREAD

    def embedding(self) -> PromptEmbedding:
        """Where the search is."""
        pooled = self.begin_pooled
        if pooled is not None and self.offset_pooled is not None:
            pooled = pooled + self.pooled_scale * self.offset_pooled
        return PromptEmbedding(self.begin + self.scale * self.offset, pooled)

    def run(self, progress: Callable[[int], None] | None) -> dict[int, PromptEmbedding]:
        settings, found = self.settings, dict[int, PromptEmbedding]()
        moved = [part for part in (self.offset, self.offset_pooled) if part is not None]
        optimizer = torch.optim.Adam(moved, lr=settings.lr)
        # One generator per row: a longer run begins with all of a shorter one.
        draws = [generator(settings.seed, "embedding-search", key) for key in self.keys]
        total = settings.budgets[-1]
        for step in range(total + 1):
            if step in settings.budgets:
                if not all(bool(part.isfinite().all()) for part in moved):
                    break
                found[step] = self.best()
            if step == total:
                break
            noise, time = self.drawn(settings.batch_size, draws)
            losses, gradients = self.losses(noise, time, gradients=True)
            if step % CHECK_EVERY == 0 and not bool(losses.isfinite().all()):
                break
            for part, gradient in zip(moved, gradients, strict=True):
                part.grad = gradient
            optimizer.step()
            if progress is not None:
                progress(step + 1)
        left = [budget for budget in settings.budgets if budget not in found]
        if left:
            logger.warning(
                "an embedding search stopped being finite and ends before %s steps; lower `lr`",
                left[0],
            )
        return found

    def drawn(self, count: int, draws: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Noise (R, count, C, h, w) and times (R, count)."""
        low, high = self.settings.times
        shape = (count, *self.latents.shape[1:])
        noise, times = [], []
        for draw in draws:
            noise.append(torch.randn(shape, generator=draw))
            times.append(self.model.draw_times(count, draw))
        time = torch.stack(times)
        if (low, high) != (0.0, 1.0):
            most = 1000 if self.model.prediction == "flow" else self.levels
            narrowed = low * most + (high - low) * time
            time = narrowed.to(time.dtype)
        return torch.stack(noise).to(self.latents), time.to(self.latents.device)

    @property
    def levels(self) -> int:
        """Number of noise levels of a model that does not predict flow."""
        return int(self.model.pipeline.scheduler.config.num_train_timesteps)

    def losses(
        self, noise: Tensor, time: Tensor, gradients: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses (R,), and their gradients in the order of the offsets."""
        model, (count, draws) = self.model, time.shape
        leaf = self.embedding()
        states, pooled = leaf.states.requires_grad_(gradients), leaf.pooled
        moved = [states]
        if self.offset_pooled is not None and pooled is not None:
            moved.append(pooled.requires_grad_(gradients))
        totals = [torch.zeros_like(part) for part in moved] if gradients else []
        each = torch.arange(count, device=noise.device).repeat_interleave(draws)
        noise, time = noise.flatten(0, 1), time.flatten()
        losses = []
        for rows in torch.arange(len(each), device=noise.device).split(self.settings.max_rows):
            own = each[rows]
            with torch.set_grad_enabled(gradients):
                clean, drawn, at = self.latents[own], noise[rows], time[rows]
                result = model.predict(
                    model.noised(clean, drawn, at),
                    at,
                    PromptEmbedding(states[own], None if pooled is None else pooled[own]),
                )
                error = (result.float() - model.target(clean, drawn, at)).square()
                loss = (error * self.weight[own]).flatten(1).sum(1)
                if gradients:
                    # A sum and no mean: Adam does not care, and half precision does not underflow.
                    for total, part in zip(
                        totals, torch.autograd.grad(loss.sum(), moved), strict=True
                    ):
                        total += part
            losses.append(loss.detach())
        size = self.weight.flatten(1).sum(1) * self.latents.shape[1]
        means = torch.cat(losses).reshape(count, draws).mean(1) / size
        if gradients:
            totals[0] *= self.scale
            if len(totals) > 1:
                totals[1] *= self.pooled_scale
        return means, totals

    def best(self) -> PromptEmbedding:
        """The best restart of every picture."""
        now, restarts = self.embedding(), self.settings.restarts
        if restarts == 1:
            return now
        seed = self.settings.seed
        draws = [generator(seed, "embedding-search-check", k) for k in self.keys[::restarts]]
        # Restarts of one picture are compared on the same draws.
        noise, time = self.drawn(CHECK_DRAWS, draws)
        losses, _ = self.losses(
            noise.repeat_interleave(restarts, 0), time.repeat_interleave(restarts, 0)
        )
        first = torch.arange(0, len(losses), restarts, device=losses.device)
        return now[first + losses.reshape(-1, restarts).argmin(1)]
