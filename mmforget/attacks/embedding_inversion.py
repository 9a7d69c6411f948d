"""Embedding inversion: is there any prompt embedding that still draws a memorized picture?

A model whose memorized prompts draw nothing any more may have forgotten the pictures, or only the
way that led to them. The attack leaves the text encoder out and looks for another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.attacks.report import Sampling, measured
from mmforget.data.memorized import MemorizedSet, MemoryKind
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.copying import CopySimilarity, ReplicationRate, copy_thresholds
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.embedding_search import (
    EmbeddingScale,
    EmbeddingSearch,
    Init,
    embedding_scale,
    search_embeddings,
)
from mmforget.seeds import derive

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
