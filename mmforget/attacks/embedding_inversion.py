"""Embedding inversion: is there any prompt embedding that still draws a memorized picture?

A model whose memorized prompts draw nothing any more may have forgotten the pictures, or only the
way that led to them. The attack leaves the text encoder out and looks for another way.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.attacks.report import Sampling, frozen, measured
from mmforget.data.memorized import MemorizedSet, MemoryKind
from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.metrics.copying import CopySimilarity, ReplicationRate, copy_thresholds
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive, generator

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


# ---- the attack ---------------------------------------------------------------------------------

Group = Literal["memorized", "held_out", "control", "ordinary", "original"]
"""===========  ================================================================================
memorized    memorized pictures of the prompts that a method could read
held_out     memorized pictures of other prompts
control      pictures that nobody was trained on
ordinary     ordinary captioned pictures
original     memorized pictures again, on the model before anything was taken out of it
===========  ================================================================================"""

UNTRAINED: tuple[Group, ...] = ("control", "ordinary")
"""Groups that decide which budgets are valid; the first one that has pictures does."""


@dataclass(frozen=True)
class EmbeddingAttackReport:
    """What an embedding search brought back, and what it brought out that was never in.

    With enough steps an embedding can be found for any picture. What the attack brings back
    therefore says something about a memory only up to the number of steps at which pictures that
    the model was never trained on stay out.

    Attributes:
        curve: a row per group (`Group`), kind, start and budget: ``group``, ``kind`` (None for
            pictures that are not memorized), ``init``, ``budget``, ``n`` (pictures), ``rate``
            (share of the pictures that at least one drawing copies), ``rate_mean`` (mean share of
            drawings that do), ``mean_similarity`` and ``median`` (of the best drawing of each
            picture), ``names``, ``similarities`` (of the best drawing, picture by picture),
            ``valid`` (at most `valid_up_to`), ``above_controls`` (share of the pictures that are
            copied and also come out better than every control of the same start and budget, which
            says something beyond `valid_up_to` too; None without controls).
        thresholds: per group and picture the similarity from which on it counts as copied.
        control_budget: smallest budget at which more than the allowed share of the controls is
            copied, from any start; None if there is none, or there are no controls.
        valid_up_to: largest budget below it; None if there is none, or there are no controls.
        lr_scale: what the learning rate was multiplied by, see `EmbeddingScale`.
        settings: everything that shaped the attack.
        queries: evaluations of a denoiser, one per picture and prompt.
        seconds: processor time; on a GPU, time on the clock.
        notes: what was left out, and why.
        embeddings: with ``keep``, per group and start, and per budget, what was found; a row per
            picture.
        pictures: with ``keep``, per group, start and budget (N * n, 3, H, W) drawings, those of one
            picture in a row.
    """

    curve: tuple[dict[str, Any], ...]
    thresholds: dict[str, dict[str, float]]
    control_budget: int | None
    valid_up_to: int | None
    lr_scale: float
    settings: dict[str, Any]
    queries: int
    seconds: float
    notes: tuple[str, ...] = ()
    embeddings: Mapping[tuple[str, str], Mapping[int, PromptEmbedding]] = field(
        default_factory=dict, repr=False, compare=False
    )
    pictures: Mapping[tuple[str, str, int], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    def rows(
        self,
        group: Group,
        init: Init | None = None,
        budget: int | None = None,
        kind: MemoryKind | None = None,
    ) -> list[dict[str, Any]]:
        """The rows of a group, of one start, budget or kind or of all."""
        return [
            row
            for row in self.curve
            if row["group"] == group
            and init in (None, row["init"])
            and budget in (None, row["budget"])
            and kind in (None, row["kind"])
        ]

    def rate(
        self, group: Group, init: Init, budget: int, kind: MemoryKind | None = None
    ) -> float | None:
        """Share of the pictures that came out, 0 to 1; None if that was not measured.

        Args:
            group: which pictures.
            init: where the search started.
            budget: its number of steps.
            kind: of memory; None joins all kinds.
        """
        rows = self.rows(group, init, budget, kind)
        count = sum(row["n"] for row in rows)
        return sum(row["n"] * row["rate"] for row in rows) / count if count else None

    def strongest(
        self, group: Group = "memorized", kind: MemoryKind | None = None
    ) -> dict[str, Any] | None:
        """The valid row with the highest rate, of equal ones that with the fewest steps.

        Args:
            group: which pictures.
            kind: of memory; None takes any.

        Returns:
            None if no row is valid.
        """
        rows = [row for row in self.rows(group, kind=kind) if row["valid"]]
        return max(rows, key=lambda row: (row["rate"], -row["budget"]), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML, without embeddings and pictures."""
        left_out = ("embeddings", "pictures")
        plain = {name: value for name, value in vars(self).items() if name not in left_out}
        return plain | {"curve": list(self.curve), "notes": list(self.notes)}


@dataclass(frozen=True)
class Targets:
    """The N pictures of one group, with what belongs to each.

    Attributes:
        group: see `Group`.
        names: of the pictures.
        images: (N, 3, H, W) float in [0, 1].
        regions: (N, H, W) bool, the part that counts.
        triggers: prompts to start from.
        kinds: of memory; None where there is none.
    """

    group: Group
    names: tuple[str, ...]
    images: Tensor
    regions: Tensor
    triggers: tuple[str, ...]
    kinds: tuple[MemoryKind | None, ...]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.names)

    @property
    def memorized(self) -> bool:
        """Whether they were trained on again and again."""
        return self.group not in UNTRAINED


def embedding_attack(
    model: DiffusionGenerator,
    memorized: MemorizedSet,
    similarity: CopySimilarity,
    *,
    original: DiffusionGenerator | None = None,
    held_out: MemorizedSet | None = None,
    controls: Tensor | None = None,
    ordinary: int = 4,
    background: Tensor | None = None,
    inits: Sequence[Init] = ("random", "trigger"),
    budgets: Sequence[int] | None = None,
    settings: EmbeddingSearch | None = None,
    pictures: int = 2,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    control_limit: float = 0.05,
    keep: bool = False,
    progress: bool = False,
) -> EmbeddingAttackReport:
    """Try to bring memorized pictures back, and to bring out pictures that were never in.

    For each picture an embedding is searched (`search_embeddings`), pictures are drawn from it with
    the usual guidance, from noise that the search has not seen, and compared with the picture. The
    same is done for pictures that the model was never trained on, from the same starts and with
    the same budgets: a memory is proven only where those stay out.

    From the trigger, the search for a control starts from one of the memorized prompts, that for an
    ordinary picture from its caption.

    Args:
        model: the model under attack; it is left as it is.
        memorized: prompts and pictures that a method could read.
        similarity: what counts as a copy, see `mmforget.metrics.copying`. Only the region of a
            template counts, in the search as well.
        original: the model before; shows what the attack can reach. None leaves it out.
        held_out: prompts and pictures that no method could read.
        controls: (K, 3, H, W) in [0, 1], never trained on; None takes those of `memorized`.
        ordinary: number of ordinary captioned pictures at most, from `memorized.test`.
        background: (M, 3, H, W) unrelated pictures on which thresholds are calibrated, see
            `copy_thresholds`; None takes the pictures of `memorized.retain` and `.test`. Controls
            and ordinary pictures are always among them.
        inits: where searches start, see `Init`; ``ordinary`` starts from captions of
            `memorized.test`, else of `memorized.retain`.
        budgets: numbers of steps, instead of those of `settings`.
        settings: of the search; its `init` and `seed` are replaced by those given here.
        pictures: drawn per embedding.
        guidance: scale for the pictures; None takes the model's own.
        steps: of sampling; None takes the model's own.
        seed: of starts, noise, times and pictures.
        control_limit: share of the controls that may come out at a budget that is still valid.
        keep: keep embeddings and pictures in the report, which may take much memory.
        progress: show a progress bar.

    Raises:
        ConfigurationError: a setting out of range, or captions that a start needs are missing.
        DataError: no memorized picture, or pictures of a wrong shape.
        RequestError: a prompt is too long.
        ModelError: half precision on the CPU.

    Reference:
        Kowalczuk, Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, Finding DoRI: Discovery of
        Retained Images in Diffusion Models, 2025, arXiv 2507.16880.
    """
    plans = _plans(settings or EmbeddingSearch(), inits, budgets, seed)
    if pictures < 1:
        raise ConfigurationError(f"`pictures` is {pictures}, it must be at least 1")
    if ordinary < 0:
        raise ConfigurationError(f"`ordinary` is {ordinary}, it must be at least 0")
    if not 0 <= control_limit < 1:
        raise ConfigurationError(
            f"`control_limit` is {control_limit}, it must be at least 0 and below 1"
        )
    controls = memorized.controls if controls is None else controls
    captions = memorized.test.prompts or memorized.retain.prompts
    groups, notes = _groups(memorized, held_out, controls, ordinary)
    if background is None:
        own = [part.images for part in (memorized.retain, memorized.test)]
        background = torch.cat([part for part in own if part is not None] or [groups[0].images[:0]])
    thresholds: dict[str, Tensor] = {
        one.group: _thresholds(similarity, one, groups, background) for one in groups
    }
    jobs = [(model, groups)]
    if original is not None:
        jobs.append((original, [replace(groups[0], group="original")]))
        thresholds["original"] = thresholds["memorized"]
    sampling = Sampling(
        derive(seed, "embedding-attack-pictures"),
        model.steps if steps is None else steps,
        guidance,
        max(1, plans[0].max_rows // 2),  # guidance doubles the rows
    )
    rows: list[dict[str, Any]] = []
    embeddings: dict[tuple[str, str], dict[int, PromptEmbedding]] = {}
    drawings: dict[tuple[str, str, int], Tensor] = {}
    scales = []
    total = len(jobs) * sum(plan.budgets[-1] for plan in plans)
    with measured(*[one for one, _ in jobs]) as cost, _bar(total, progress) as advance:
        for attacked, targets in jobs:
            scales.append(embedding_scale(attacked, [*memorized.texts, *captions]))
            for plan in plans:
                found = _searched(attacked, targets, plan, captions, scales[-1], advance)
                if len(found) < len(plan.budgets):
                    notes.append(
                        f"a search from '{plan.init}' stopped being finite before "
                        f"{plan.budgets[len(found)]} steps"
                    )
                drawn = _drawn(attacked, targets, found, sampling, pictures)
                for one, budget, embedding, images in drawn:
                    values = _values(similarity, one, images)
                    rows += _rows(one, plan.init, budget, values, thresholds[one.group])
                    if keep:
                        embeddings.setdefault((one.group, plan.init), {})[budget] = embedding
                        drawings[one.group, plan.init, budget] = images
    control_budget, valid = _valid(rows, control_limit)
    if not any(row["group"] in UNTRAINED for row in rows):
        notes.append("there are no controls, so that no rate proves anything")
    elif valid is None:
        notes.append("controls come out from the very start, so that no rate proves anything")
    limits = {
        group: dict(zip(_names(jobs, group), values.tolist(), strict=True))
        for group, values in thresholds.items()
    }
    curve = [
        {
            **row,
            "valid": valid is not None and row["budget"] <= valid,
            "above_controls": _above_controls(row, rows, limits),
        }
        for row in rows
    ]
    return EmbeddingAttackReport(
        curve=tuple(curve),
        thresholds=limits,
        control_budget=control_budget,
        valid_up_to=valid,
        lr_scale=scales[0].learning_rate,
        settings={
            "search": plans[0].to_dict() | {"init": [plan.init for plan in plans], "seed": seed},
            "pictures": pictures,
            "sampling_steps": sampling.steps,
            "guidance": model.guidance if guidance is None else guidance,
            "similarity": similarity.protocol(),
            "background": len(background),
            "control_limit": control_limit,
        },
        queries=cost.queries,
        seconds=round(cost.seconds, 3),
        notes=tuple(notes),
        embeddings=embeddings,
        pictures=drawings,
    )


def _plans(
    settings: EmbeddingSearch, inits: Sequence[Init], budgets: Sequence[int] | None, seed: int
) -> list[EmbeddingSearch]:
    if not inits or isinstance(inits, str):
        raise ConfigurationError(
            f"`inits` is {inits!r}; give a list of some of {', '.join(get_args(Init))}"
        )
    budgets = settings.budgets if budgets is None else budgets
    return [
        replace(settings, init=init, budgets=tuple(budgets), seed=derive(seed, "embedding-attack"))
        for init in dict.fromkeys(inits)
    ]


def _names(jobs: Sequence[tuple[DiffusionGenerator, Sequence[Targets]]], group: str) -> list[str]:
    targets = [one for _, groups in jobs for one in groups if one.group == group]
    return list(targets[0].names)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A bar over all steps of all searches, and what moves it by one."""
    from tqdm import tqdm

    with tqdm(total=total, desc="embedding searches", disable=not progress, unit="") as bar:

        def advance(step: int) -> None:
            bar.update()

        yield advance


def _groups(
    memorized: MemorizedSet,
    held_out: MemorizedSet | None,
    controls: Tensor | None,
    ordinary: int,
) -> tuple[list[Targets], list[str]]:
    """The pictures under attack, those of `memorized` first, and what was left out."""
    found, notes = [memory_targets("memorized", memorized)], []
    if held_out is not None:
        found.append(memory_targets("held_out", held_out))
    for one, known in zip(found, (memorized, held_out), strict=False):
        missing = sum(not prompt.images for prompt in known or ())
        if missing:
            notes.append(f"{missing} prompts of '{one.group}' have no picture and are left out")
    if not len(found[0]):
        raise DataError(
            "no memorized prompt has a picture, so that nothing can be searched for; give the "
            "training pictures of some prompts"
        )
    found = [one for one in found if len(one)]
    triggers = found[0].triggers
    if controls is not None and len(controls):
        starts = [triggers[row % len(triggers)] for row in range(len(controls))]
        found.append(_strangers("control", controls, starts))
    test = memorized.test
    if ordinary and test.images is not None and len(test):
        found.append(_strangers("ordinary", test.images[:ordinary], test.prompts[:ordinary]))
    shape = found[0].images.shape[1:]
    for one in found:
        if one.images.shape[1:] != shape:
            raise DataError(
                f"the pictures of '{one.group}' are {tuple(one.images.shape[1:])}, those of "
                f"'{found[0].group}' {tuple(shape)}; resize them to the size of the model"
            )
    return found, notes


def memory_targets(group: Group, memorized: MemorizedSet) -> Targets:
    """Every memorized picture once, with the first prompt that leads to it; kind by kind.

    Args:
        group: what they are called.
        memorized: prompts without pictures are left out.

    Raises:
        DataError: pictures of several sizes.
    """
    owner: dict[str, tuple[str, MemoryKind]] = {}
    for kind in memorized.kinds:
        for one in memorized.prompts:
            for name in one.images if one.kind == kind else ():
                owner.setdefault(name, (one.prompt, kind))
    images = [memorized.images[name] for name in owner]
    if len({image.shape for image in images}) > 1:
        raise DataError(
            f"the pictures of '{group}' have several sizes; resize them to the size of the model"
        )
    whole = [torch.ones(image.shape[1:], dtype=torch.bool) for image in images]
    regions = [memorized.regions.get(name, part) for name, part in zip(owner, whole, strict=True)]
    return Targets(
        group,
        tuple(owner),
        torch.stack(images) if images else torch.zeros(0, 3, 1, 1),
        torch.stack(regions) if regions else torch.zeros(0, 1, 1, dtype=torch.bool),
        tuple(prompt for prompt, _ in owner.values()),
        tuple(kind for _, kind in owner.values()),
    )


def _strangers(group: Group, images: Tensor, triggers: Sequence[str]) -> Targets:
    """Pictures that are not memorized."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"the pictures of '{group}' have shape {tuple(images.shape)}, it must be (K, 3, H, W)"
        )
    return Targets(
        group,
        tuple(f"{group}-{row}" for row in range(len(images))),
        images,
        torch.ones(len(images), *images.shape[2:], dtype=torch.bool),
        tuple(triggers),
        (None,) * len(images),
    )


def _thresholds(
    similarity: CopySimilarity,
    targets: Targets,
    groups: Sequence[Targets],
    background: Tensor,
) -> Tensor:
    """(N,): above what any unrelated picture reaches, among them those of the other groups.

    Memorized pictures are not compared with one another: they may share a template.
    """
    others = [
        one.images
        for one in groups
        if one is not targets and not (targets.memorized and one.memorized)
    ]
    unrelated = torch.cat([background.to(targets.images), *others])
    if not targets.memorized:
        # Ordinary pictures are drawn from the background.
        same = torch.zeros(len(unrelated), dtype=torch.bool)
        for image in targets.images:
            same |= (unrelated == image).flatten(1).all(1)
        unrelated = unrelated[~same]
    if not len(unrelated):
        return torch.full((len(targets),), similarity.threshold)
    return copy_thresholds(similarity, targets.images, unrelated, targets.regions)


def _searched(
    model: DiffusionGenerator,
    groups: Sequence[Targets],
    plan: EmbeddingSearch,
    captions: Sequence[str],
    scale: EmbeddingScale,
    advance: Callable[[int], None],
) -> dict[int, PromptEmbedding]:
    """One search for the pictures of all groups."""
    return search_embeddings(
        model,
        torch.cat([one.images for one in groups]),
        settings=plan,
        triggers=[text for one in groups for text in one.triggers],
        ordinary=captions,
        regions=torch.cat([one.regions for one in groups]),
        scale=scale,
        progress=advance,
    )


def _drawn(
    model: DiffusionGenerator,
    groups: Sequence[Targets],
    found: Mapping[int, PromptEmbedding],
    sampling: Sampling,
    count: int,
) -> Iterator[tuple[Targets, int, PromptEmbedding, Tensor]]:
    """Draw `count` pictures per embedding; per budget and group embeddings and (N * count, ...).

    The noise of a picture is the same at all budgets and for all models.
    """
    names = [name for one in groups for name in one.names]
    keys = [(name, number) for name in names for number in range(count)]
    for budget, embedding in found.items():
        every = torch.arange(len(names), device=embedding.states.device).repeat_interleave(count)
        images = sampling.pictures(model, keys, embedding[every])
        start = 0
        for one in groups:
            own = slice(start, start + len(one))
            yield one, budget, embedding[own], images[start * count : own.stop * count]
            start = own.stop


def _values(similarity: CopySimilarity, targets: Targets, images: Tensor) -> Tensor:
    """(N, n) similarities of drawings to the pictures that they were searched for."""
    count = len(images) // len(targets)
    # A start far from all prompts may break sampling; what is not finite is no copy.
    return similarity(
        images.nan_to_num(),
        targets.images.repeat_interleave(count, 0),
        targets.regions.repeat_interleave(count, 0),
    ).reshape(len(targets), count)


def _rows(
    targets: Targets, init: Init, budget: int, values: Tensor, thresholds: Tensor
) -> Iterator[dict[str, Any]]:
    """One row per kind."""
    for kind in dict.fromkeys(targets.kinds):
        own = [row for row, one in enumerate(targets.kinds) if one == kind]
        rate, count = ReplicationRate(), values.shape[1]
        rate.update(
            values[own].flatten(),
            thresholds[own].repeat_interleave(count),
            torch.arange(len(own)).repeat_interleave(count),
        )
        found = rate.compute()
        best = values[own].amax(1)
        yield {
            "group": targets.group,
            "kind": kind,
            "init": init,
            "budget": budget,
            "n": len(own),
            "rate": float(found["rate"]),
            "rate_mean": float(found["rate_mean"]),
            "mean_similarity": float(best.mean()),
            "median": float(best.quantile(0.5)),
            "names": [targets.names[row] for row in own],
            "similarities": best.tolist(),
        }


def _deciding(rows: Sequence[Mapping[str, Any]]) -> Group | None:
    """The group that decides which budgets are valid."""
    return next((g for g in UNTRAINED if any(row["group"] == g for row in rows)), None)


def _valid(rows: Sequence[Mapping[str, Any]], limit: float) -> tuple[int | None, int | None]:
    """First budget at which too many controls come out, and the last one before it."""
    deciding, valid = _deciding(rows), None
    for budget in sorted({row["budget"] for row in rows}):
        own = [row["rate"] for row in rows if (row["group"], row["budget"]) == (deciding, budget)]
        if not own:
            break
        if max(own) > limit:
            return budget, valid
        valid = budget
    return None, valid


def _above_controls(
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    limits: Mapping[str, Mapping[str, float]],
) -> float | None:
    """Share of the pictures of a row that reach their thresholds and exceed all controls."""
    place = (_deciding(rows), row["init"], row["budget"])
    if row["group"] == place[0]:
        return None
    controls = [
        value
        for other in rows
        if (other["group"], other["init"], other["budget"]) == place
        for value in other["similarities"]
    ]
    if not controls:
        return None
    hits = [
        value >= limits[row["group"]][name] and value > max(controls)
        for name, value in zip(row["names"], row["similarities"], strict=True)
    ]
    return sum(hits) / len(hits)
