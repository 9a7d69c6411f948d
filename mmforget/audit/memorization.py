"""The audit of memorized pictures: copies at the known prompts, under attack, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mmforget.audit.drawing import IDENTITY, add_costs, as_audited, drawer, floats, render, spread
from mmforget.audit.limits import check_limits
from mmforget.audit.memorization_attack import INITS, AttackFinding, attack_all
from mmforget.audit.memorization_pictures import measure
from mmforget.audit.memorization_verdict import conclude
from mmforget.audit.memorization_words import (
    curves,
    describe,
    examples,
    not_claimed,
    not_measured,
    provenance,
    warnings,
)
from mmforget.audit.results import Results
from mmforget.audit.rows import METRICS, Rows
from mmforget.audit.scene import AuditedModel
from mmforget.data.memorized import MemorizedSet, MemoryKind
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.copying import (
    CopySimilarity,
    memory_thresholds,
    similarity_to_memories,
)
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive, generator

CONTROLS = ("identity",)


@dataclass(frozen=True)
class MemorizationAuditSettings:
    """How a model is audited for memorized pictures.

    Args:
        seed: base of all draws.
        pictures: per memorized prompt, at different seeds.
        ordinary: pictures of prompts that are not memorized, in all.
        steps, guidance: of the sampler; None takes those of the original model, for all models.
        batch_size: pictures at a time.
        background: unrelated real pictures that copies are told from, at most.
        loss_pictures: real pictures whose denoising loss is measured, at most.
        detection: pictures per prompt of the detector; 0 leaves it out.
        detection_prompts: ordinary prompts it compares with, at most.
        max_rate: share of prompts that may still bring a copy.
        max_loss_rise: rise of the denoising loss on ordinary pictures that is accepted.
        max_empty: share of empty pictures that is accepted beyond that of the original model.
        min_original_rate: below this the original model does not hold the memory.
        max_false_rate: share of the original's ordinary pictures that may pass for a copy.
        controls: ``identity``: the original model with other seeds.
        attack: search for embeddings that bring the pictures back, in all models and with pictures
            that nobody was trained on.
        attack_inits: where it starts: ``random``, ``trigger``, ``ordinary``.
        attack_budgets: steps after which it is looked at.
        attack_pictures: drawn from each embedding.
        attack_batch_size: draws of noise per picture and step.
        attack_ordinary: ordinary pictures that are attacked as well, for information; the controls
            are the pictures that nobody was trained on.
        max_control_rate: share of never-trained pictures that an attack may bring out and still
            mean something.
        min_attack_steps: an attack that means something only below so many steps proves nothing.
        examples: prompts of each kind whose pictures the report shows; 0 shows none.
        example_pictures: per prompt.
        tuning: how settings were chosen, for the report.

    Raises:
        ConfigurationError: a number out of range, or an unknown name.
    """

    seed: int = 0
    pictures: int = 10
    ordinary: int = 64
    steps: int | None = None
    guidance: float | None = None
    batch_size: int = 64
    background: int = 4000
    loss_pictures: int = 256
    detection: int = 4
    detection_prompts: int = 64
    max_rate: float = 0.1
    max_loss_rise: float = 0.05
    max_empty: float = 0.1
    min_original_rate: float = 0.5
    max_false_rate: float = 0.05
    controls: tuple[str, ...] = ("identity",)
    attack: bool = False
    attack_inits: tuple[str, ...] = ("random", "trigger")
    attack_budgets: tuple[int, ...] = (0, 10, 25, 50, 100)
    attack_pictures: int = 2
    attack_batch_size: int = 8
    attack_ordinary: int = 4
    max_control_rate: float = 0.1
    min_attack_steps: int = 50
    examples: int = 4
    example_pictures: int = 3
    tuning: str = ""

    def __post_init__(self) -> None:
        check_limits(
            self,
            {
                "pictures": 1,
                "ordinary": 2,
                "steps": 1,
                "batch_size": 1,
                "background": 1,
                "loss_pictures": 1,
                "detection": 0,
                "detection_prompts": 1,
                "attack_pictures": 1,
                "attack_batch_size": 1,
                "attack_ordinary": 0,
                "min_attack_steps": 1,
                "examples": 0,
                "example_pictures": 1,
            },
            ("max_rate", "max_loss_rise", "max_empty", "min_original_rate", "max_false_rate",
             "max_control_rate"),
            {"controls": CONTROLS, "attack_inits": INITS},
        )  # fmt: skip
        budgets = tuple(sorted(set(self.attack_budgets)))
        object.__setattr__(self, "attack_budgets", budgets)
        if self.attack and not self.attack_inits:
            raise ConfigurationError(
                f"`audit.attack_inits` is empty; give some of {', '.join(INITS)}"
            )
        if self.attack and (not budgets or budgets[0] < 0 or budgets[-1] < self.min_attack_steps):
            raise ConfigurationError(
                f"`audit.attack_budgets` are {list(budgets)}; they must reach "
                f"`audit.min_attack_steps`, {self.min_attack_steps}, or the attack proves nothing"
            )


@dataclass(frozen=True)
class Part:
    """Memorized prompts of one kind that were, or were not, shown to the method.

    Attributes:
        group: ``located``: the method has read these prompts; ``held_out``: it has not.
        kind: what kind of memory.
        memorized: the prompts.
        rows: prompt and number of each picture, those of one prompt in a row.
    """

    group: Literal["located", "held_out"]
    kind: MemoryKind
    memorized: MemorizedSet
    rows: tuple[tuple[str, int], ...]

    @property
    def split(self) -> str:
        """Name in the results."""
        return f"{self.group}/{self.kind}"


class MemorizationScene:
    """Models, prompts, pictures, and how alike they are: what all metrics are made of.

    Args:
        models: the original first, then unlearned models and controls.
        memorized: what the method has read.
        held_out: memorized prompts that it has not.
        similarity: tells copies.
        clip: a `ClipModel` for the score of ordinary prompts, or None.
        settings: see `MemorizationAuditSettings`.
        progress: show bars.

    Raises:
        DataError: no picture or no background, or pictures of a size that cannot be compared.
        RequestError: a prompt that is too long.
    """

    def __init__(
        self,
        models: Sequence[AuditedModel],
        memorized: MemorizedSet,
        held_out: MemorizedSet | None,
        similarity: CopySimilarity,
        clip: Any,
        settings: MemorizationAuditSettings,
        progress: bool = False,
    ) -> None:
        self.models, self.similarity, self.clip = list(models), similarity, clip
        self.memorized, self.held_out = memorized, held_out
        self.settings, self.progress = settings, progress
        self.remarks: list[str] = []
        self.pictures: dict[str, Tensor] = {}
        self.parts = [
            *_parts("located", memorized, settings.pictures),
            *(_parts("held_out", held_out, settings.pictures) if held_out else ()),
        ]
        self.ordinary = self._ordinary_rows()
        self.rows = [row for part in self.parts for row in part.rows] + self.ordinary
        self._check()
        self.thresholds = {
            part.split: memory_thresholds(similarity, part.memorized, self.background)
            for part in self.parts
        }
        self._likeness: dict[tuple[str, str], Tensor] = {}

    def _check(self) -> None:
        named = [one for part in self.parts for one in part.memorized.prompts]
        if not any(one.images for one in named):
            raise DataError(
                "no memorized prompt has a training picture, so that nothing can be called a copy; "
                "add the pictures, or look for copies with `mmforget memorization find`"
            )
        drawer(self.original).check_length([prompt for prompt, _ in self.rows])
        model = drawer(self.original)
        height, width = (side * model.pipeline.vae_scale_factor for side in model.latent_shape[1:])
        probe = torch.zeros(1, 3, height, width)
        for one in named:
            for name in one.images:
                # refuses, before anything is drawn, what cannot be compared
                self.similarity(probe, self._picture(name)[None])

    def _picture(self, name: str) -> Tensor:
        held = self.held_out.images if self.held_out is not None else {}
        return self.memorized.images[name] if name in self.memorized.images else held[name]

    def _ordinary_rows(self) -> list[tuple[str, int]]:
        prompts = list(dict.fromkeys(self.memorized.test.prompts))
        if not prompts:
            self.remarks.append(
                "no ordinary prompts were given for tests, so that pictures without a prompt stand "
                "in for them"
            )
            prompts = [""]
        count = self.settings.ordinary
        order = torch.randperm(
            len(prompts), generator=generator(self.settings.seed, "ordinary prompts")
        ).tolist()
        return list(spread([prompts[place] for place in order[:count]], count))

    # ---- models and places ----------------------------------------------------------------------

    @property
    def original(self) -> AuditedModel:
        """The model before."""
        return next(one for one in self.models if one.entry.role == "original")

    def by_role(self, role: str) -> list[AuditedModel]:
        """The models that play a role."""
        return [one for one in self.models if one.entry.role == role]

    @property
    def masks(self) -> list[AuditedModel]:
        """Controls that change weights: masks of the same density that located nothing."""
        return [one for one in self.by_role("control") if one.entry.name != IDENTITY]

    def part(self, group: str, kind: str) -> Part | None:
        """The prompts of a group and kind, if there are any."""
        found = [part for part in self.parts if (part.group, part.kind) == (group, kind)]
        return found[0] if found else None

    @cached_property
    def kinds(self) -> tuple[MemoryKind, ...]:
        """Kinds of the prompts that the method has read."""
        return tuple(part.kind for part in self.parts if part.group == "located")

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where the pictures of each split lie."""
        found, start = {}, 0
        for part in self.parts:
            found[part.split] = slice(start, start + len(part.rows))
            start += len(part.rows)
        found["ordinary"] = slice(start, start + len(self.ordinary))
        return found

    @cached_property
    def background(self) -> Tensor:
        """(M, 3, H, W) real pictures that are not memorized; those that were never trained last.

        Raises:
            DataError: there are none.
        """
        given = [self.memorized.test.images, self.memorized.retain.images, self.memorized.controls]
        known = [images for images in given if images is not None and len(images)]
        if not known:
            raise DataError(
                "there are no pictures that are not memorized; give `test` or `retain` pictures, "
                "or copies cannot be told from resemblance"
            )
        return torch.cat(known)[: self.settings.background]

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampler's settings, equal for all models."""
        first, settings = drawer(self.original), self.settings
        return {
            "sampler": type(first.pipeline.scheduler).__name__,
            "steps": settings.steps or first.steps,
            "guidance": first.guidance if settings.guidance is None else settings.guidance,
            "seed": settings.seed,
        }

    def shown_prompts(self, part: Part) -> list[int]:
        """Rows of the prompts whose pictures the report shows: the first that have one."""
        known = [row for row, one in enumerate(part.memorized.prompts) if one.images]
        return known[: self.settings.examples]

    # ---- pictures -------------------------------------------------------------------------------

    def of(self, model: str, split: str) -> Tensor:
        """Pictures of a model for a split, (n, 3, H, W) float."""
        return floats(self.pictures[model][self.places[split]])

    def likeness(self, model: str, part: Part) -> Tensor:
        """(P, n) similarity of a model's pictures to the training pictures of their prompts."""
        key = model, part.split
        if key not in self._likeness:
            self._likeness[key] = similarity_to_memories(
                self.similarity, self.of(model, part.split), part.memorized, self.settings.pictures
            )
        return self._likeness[key]

    def draw(self) -> None:
        """Make the pictures of all models, from the same noise but for the control ``identity``."""
        base = derive(self.settings.seed, "verifying memories")
        for one in self.models:
            self._draw(one.entry.name, drawer(one), base)
        if "identity" in self.settings.controls:
            first = drawer(self.original)
            self._draw(IDENTITY, first, derive(self.settings.seed, "identity"))
            source = f"'{self.original.entry.name}' with other noise"
            entry = replace(
                self.original.entry, name=IDENTITY, role="control", source=source, cost={},
                details={},
            )  # fmt: skip
            self.models.append(AuditedModel(entry, first))

    def _draw(self, name: str, model: DiffusionGenerator, seed: int) -> None:
        from tqdm import tqdm

        total = len(self.rows)
        with tqdm(total=total, desc=f"pictures of {name}", disable=not self.progress, unit="") as b:
            self.pictures[name] = render(
                model,
                self.rows,
                seed,
                self.sampling["steps"],
                self.sampling["guidance"],
                self.settings.batch_size,
                done=b.update,
            )


def _parts(
    group: Literal["located", "held_out"], memorized: MemorizedSet, pictures: int
) -> list[Part]:
    found = []
    for kind in memorized.kinds:
        own = memorized.of_kind(kind)
        rows = tuple((prompt, number) for prompt in own.texts for number in range(pictures))
        found.append(Part(group, kind, own, rows))
    return found


Remember = Callable[[str, Callable[[], dict[str, Any]]], Mapping[str, Any]]
"""From a name and a computation to its plain result, maybe one that an earlier run has kept."""


def audit_memorization(
    original: DiffusionGenerator | AuditedModel,
    unlearned: DiffusionGenerator | AuditedModel | Sequence[AuditedModel],
    memorized: MemorizedSet,
    similarity: CopySimilarity,
    held_out: MemorizedSet | None = None,
    settings: MemorizationAuditSettings | None = None,
    *,
    clip: Any = None,
    title: str = "",
    progress: bool = False,
    command: str = "",
    remember: Remember | None = None,
) -> Results:
    """Measure whether a model still draws training pictures, at their prompts and under attack.

    All models draw the same prompts from the same noise, once. No model is changed; a metric that
    fails is a row with its error. The word *removed* is used only if the attack was run together
    with its controls: pictures that nobody was trained on, and the original model.

    Args:
        original: the model before.
        unlearned: the model after, or several with their entries; those with the role ``control``
            were changed as much without locating anything.
        memorized: the prompts that the method has read, with ordinary prompts and pictures in
            `test`, and pictures that were never trained on in `controls`.
        similarity: tells copies.
        held_out: memorized prompts that the method has not read.
        settings: see `MemorizationAuditSettings`.
        clip: a `ClipModel`, for the CLIP score of ordinary prompts.
        title: for people.
        progress: show bars.
        command: how the audit was started.
        remember: keeps the results of attacks, so that a stopped audit need not repeat them.

    Raises:
        ConfigurationError: models of the same name.
        DataError: see `MemorizationScene`.
        RequestError: a prompt is too long.
        ModelError: half precision on the CPU.
    """
    settings = settings or MemorizationAuditSettings()
    start = time.perf_counter()
    given = unlearned if isinstance(unlearned, Sequence) else [unlearned]
    models = [as_audited(original, "original"), *(as_audited(one, "unlearned") for one in given)]
    names = [one.entry.name for one in models]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"the models {names} need different names")
    scene = MemorizationScene(models, memorized, held_out, similarity, clip, settings, progress)
    scene.draw()
    rows = Rows()
    measure(scene, rows)
    attacked: dict[str, AttackFinding] = {}
    if settings.attack:
        attacked = attack_all(scene, rows, remember or _forgetful)
    add_costs(rows, scene.original, [*scene.by_role("unlearned"), *scene.masks])
    checks, verdict, outcomes = conclude(scene, rows, attacked)
    order = list(METRICS)
    entries = [
        replace(
            one.entry,
            hash=one.entry.hash or state_hash(one.model),
            details=one.entry.details | outcomes.get(one.entry.name, {}),
        )
        for one in scene.models
    ]
    return Results(
        title=title or f"Forget {len(memorized)} memorized prompts",
        goal="concept_removal",
        requests=[memorized.request.to_dict()],
        data=describe(scene),
        models=entries,
        metrics=sorted(rows.rows.values(), key=lambda row: order.index(row.metric)),
        checks=checks,
        verdict=verdict,
        curves=curves(scene, attacked),
        examples=examples(scene, attacked),
        not_measured=not_measured(scene, rows, attacked),
        not_claimed=not_claimed(attacked),
        provenance=provenance(scene, time.perf_counter() - start, command),
        tuning=settings.tuning,
        warnings=[*scene.remarks, *warnings(scene, rows, attacked, entries)],
    )


def _forgetful(name: str, compute: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
    return compute()
