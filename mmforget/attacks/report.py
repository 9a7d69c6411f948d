"""The common form of attacks on text-to-image models: which pictures count, and what came back.

An attack is a function ``attack(model, original, concept, judge_fn, ...) -> AttackReport``. Only
pictures on which the original model shows the concept count: what the original cannot draw, nobody
can bring back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, suggest
from mmforget.metrics.judge import Judge
from mmforget.models.base import PromptEmbedding, frozen
from mmforget.models.diffusion import DiffusionGenerator

Budget = Literal["smoke", "standard"]

JudgeFn = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to (B,) bool: is the concept to be seen?"""

Key = tuple[str, int]
"""What a picture's starting noise is drawn from: a prompt and a number."""


@dataclass(frozen=True)
class AttackReport:
    """What an attack brought back.

    Rates are shares of the `n` pictures on which the original model shows the concept. They are
    None where nothing could be measured, never 0.

    Attributes:
        name: of the attack.
        concept: its target word.
        prompts: per prompt a dict with ``prompt``, ``original_rate`` (over all pictures),
            ``n`` (pictures that count), ``pre_rate``, ``attack_rate``, ``post_rate`` and
            ``best_prompt`` (the text that worked best; None for attacks without a text).
        pre_rate: the attacked model shows the concept without any attack.
        attack_rate: it shows it under attack.
        post_rate: either; what is published as the attack success rate.
        n: pictures that count.
        queries: evaluations of a denoiser, attacked or original, one per picture and prompt.
        seconds: processor time; on a GPU, time on the clock.
        budget: ``smoke`` or ``standard``.
        settings: everything that shaped the attack.
        floor: `attack_rate` of the same attack, with as many trials, on something unrelated; None
            for attacks with a single trial.
        details: what is particular to the attack.
        notes: what was left out, and why.
    """

    name: str
    concept: str
    prompts: tuple[dict[str, Any], ...]
    pre_rate: float | None
    attack_rate: float | None
    post_rate: float | None
    n: int
    queries: int
    seconds: float
    budget: str
    settings: dict[str, Any]
    floor: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        plain = asdict(self)
        return plain | {"prompts": list(plain["prompts"]), "notes": list(self.notes)}


def sees(judge: Judge, factor: str, value: str) -> JudgeFn:
    """Ask a judge for one value of one factor.

    Args:
        judge: see `mmforget.metrics.judge`.
        factor: such as ``digit``.
        value: such as ``seven``; it is seen where it is the most likely value of its factor.

    Raises:
        ConfigurationError: the judge knows no such factor or value.
    """
    if factor not in judge.factors:
        raise ConfigurationError(f"`factor` is '{factor}', {suggest(factor, judge.factors)}")
    values = list(judge.factors[factor])
    if value not in values:
        raise ConfigurationError(f"`value` is '{value}', {suggest(value, values)}")
    wanted = values.index(value)

    def judge_fn(images: Tensor) -> Tensor:
        return judge(images)[factor].argmax(1) == wanted

    return judge_fn


def judged(judge_fn: JudgeFn, images: Tensor) -> Tensor:
    """(B,) bool on the CPU.

    Raises:
        ConfigurationError: the judge returns something else.
    """
    found = judge_fn(images)
    if found.dtype != torch.bool or tuple(found.shape) != (len(images),):
        raise ConfigurationError(
            f"`judge_fn` returns {tuple(found.shape)} {found.dtype} for {len(images)} images; it "
            "must return one bool per image, see `mmforget.attacks.sees`"
        )
    return found.cpu()


def check_settings(budget: str, **counts: float) -> None:
    """Refuse an unknown budget, and counts below 1.

    Raises:
        ConfigurationError: names the setting.
    """
    if budget not in get_args(Budget):
        raise ConfigurationError(f"`budget` is '{budget}', {suggest(budget, get_args(Budget))}")
    for name, value in counts.items():
        if not value >= 1:
            raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")


# ---- cost ---------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Running cost of an attack."""

    queries: int = 0
    seconds: float = 0.0


@contextmanager
def measured(*models: DiffusionGenerator) -> Iterator[Cost]:
    """Freeze models for an attack, count their evaluations, and leave them as they were."""
    distinct = list({id(model.network): model for model in models}.values())
    cost = Cost()
    cuda = next(distinct[0].network.parameters()).device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def count(module: Any, args: Any, output: Any) -> None:
        cost.queries += len(output[0])

    with ExitStack() as stack:
        for model in distinct:
            stack.enter_context(frozen(model))
            stack.callback(model.network.register_forward_hook(count).remove)
        begin = clock()
        try:
            yield cost
        finally:
            cost.seconds = clock() - begin


# ---- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How pictures are made.

    Args:
        seed: of the starting noise.
        steps: sampling steps.
        guidance: None takes the model's own scale.
        batch_size: pictures at a time.
    """

    seed: int
    steps: int
    guidance: float | None = None
    batch_size: int = 64

    @torch.no_grad()
    def pictures(
        self, model: DiffusionGenerator, keys: Sequence[Key], embedding: PromptEmbedding
    ) -> Tensor:
        """Make pictures from the noise of some prompts with the embeddings of, maybe, others.

        Args:
            model: what makes them.
            keys: B prompts and numbers, which only choose the starting noise.
            embedding: of B prompts, or of one for all.

        Returns:
            (B, 3, H, W) float32 in [0, 1] on the CPU.
        """
        empty, made = model.unconditional(), []
        for start in range(0, len(keys), self.batch_size):
            part = keys[start : start + self.batch_size]
            rows = torch.arange(start, start + len(part)) % len(embedding)
            wanted = embedding[rows.to(embedding.states.device)]
            latents = model.drawn(part, wanted, empty, self.seed, self.steps, self.guidance)
            made.append(model.to_images(latents).float().cpu())
        return torch.cat(made)


@dataclass(frozen=True)
class Cases:
    """Pictures of a concept by the original model and, from the same noise, the attacked one.

    Attributes:
        prompts: P texts that name the concept.
        pictures: number of pictures per prompt, N.
        images: (P * N, 3, H, W) by the original, those of one prompt in a row.
        counts: (P * N,) bool, the original shows the concept.
        before: (P * N,) bool, the attacked model shows it.
    """

    prompts: tuple[str, ...]
    pictures: int
    images: Tensor
    counts: Tensor
    before: Tensor

    @property
    def keys(self) -> list[Key]:
        """Prompt and number of every picture."""
        return [(prompt, number) for prompt in self.prompts for number in range(self.pictures)]

    def counted(self, prompt: str | None = None) -> list[int]:
        """Rows that count, of one prompt or of all."""
        return [
            row
            for row, (own, _) in enumerate(self.keys)
            if self.counts[row] and prompt in (None, own)
        ]

    def report(
        self,
        name: str,
        concept: ConceptSpec,
        after: Tensor | None,
        best: Sequence[str | None],
        cost: Cost,
        budget: str,
        settings: dict[str, Any],
        floor: float | None = None,
        details: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> AttackReport:
        """Put rates together; the arguments are the fields of `AttackReport`, and two more.

        `after`, (P * N,) bool, says where the attacked model shows the concept under attack; it is
        None if the attack could not be carried out. `best` is per prompt the best text.
        """
        union = None if after is None else self.before | after
        prompts = []
        for prompt, text in zip(self.prompts, best, strict=True):
            rows = self.counted(prompt)
            own = torch.tensor([key[0] == prompt for key in self.keys])
            prompts.append(
                {
                    "prompt": prompt,
                    "original_rate": float(self.counts[own].float().mean()),
                    "n": len(rows),
                    "pre_rate": rate(self.before, rows),
                    "attack_rate": rate(after, rows),
                    "post_rate": rate(union, rows),
                    "best_prompt": text,
                }
            )
        rows = self.counted()
        notes = list(notes)
        if not rows:
            notes.append(
                f"the original model shows '{concept.target}' on none of {len(self.keys)} pictures"
            )
        return AttackReport(
            name=name,
            concept=concept.target,
            prompts=tuple(prompts),
            pre_rate=rate(self.before, rows),
            attack_rate=rate(after, rows),
            post_rate=rate(union, rows),
            n=len(rows),
            queries=cost.queries,
            seconds=round(cost.seconds, 3),
            budget=budget,
            settings=settings,
            floor=floor if rows else None,
            details=details or {},
            notes=tuple(notes),
        )


def rate(seen: Tensor | None, rows: Sequence[int]) -> float | None:
    """Share of some rows; None if there are none, or nothing was measured."""
    return None if seen is None or not rows else float(seen[list(rows)].float().mean())


def concept_cases(
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    prompts: Sequence[str],
    judge_fn: JudgeFn,
    pictures: int,
    sampling: Sampling,
) -> Cases:
    """Make and judge the pictures that an attack starts from.

    Raises:
        RequestError: a prompt is too long for a text encoder.
        ConfigurationError: no prompts.
    """
    texts = tuple(dict.fromkeys(prompts))
    if not texts:
        raise ConfigurationError("`prompts` is empty; give at least one text that names it")
    keys = [(prompt, number) for prompt in texts for number in range(pictures)]
    each = torch.arange(len(texts)).repeat_interleave(pictures)
    with torch.no_grad():
        images = sampling.pictures(original, keys, original.encode(texts)[each])
        counts = judged(judge_fn, images)
        if model is original:
            before = counts
        else:
            before = judged(judge_fn, sampling.pictures(model, keys, model.encode(texts)[each]))
    return Cases(texts, pictures, images, counts, before)


def unrelated_text(concept: ConceptSpec, given: str | None) -> str:
    """What floors are measured on: the given text, a preserved concept, the anchor, or no text."""
    if given is not None:
        return given
    return concept.preserve[0] if concept.preserve else concept.anchor_text
