"""The common form of attacks on generators of GANs, and what their results are compared with.

An attack is a function ``attack(model, ..., seed) -> GeneratorAttackReport``. It leaves the model
as it was, and starts from latents that depend on the seed alone, so that several models can be
attacked in the same way. A rate by itself says little: strokes recombine, and a generator that has
never seen a seven yields to most attacks. `compare_attack` therefore runs one on the original, the
unlearned and the retrained models, or, where nobody has a retrained one, for a concept that the
original does not draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mmforget.attacks.report import JudgeFn
from mmforget.audit.intervals import Interval, wilson
from mmforget.errors import ConfigurationError
from mmforget.metrics.judge import ClassifierJudge, value_index
from mmforget.models.base import HasLatents, Latents, LatentSpace, check_capabilities, frozen
from mmforget.models.concept_guide import ConceptGuide

ScoreFn = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to (B,) logits, differentiable; above 0 it is to be seen."""

SHOWN = 16
AT_A_TIME = 128


@dataclass(frozen=True)
class GeneratorAttackReport:
    """What an attack on a generator brought back.

    Attributes:
        name: of the attack.
        rate: share of the `n` trials that show the concept under attack; None where nothing could
            be measured, never 0.
        n: trials.
        native: share that shows it before the attack, from the same latents; None if that has no
            meaning.
        seconds: processor time; on a GPU, time on the clock.
        settings: everything that shaped the attack.
        details: what is particular to the attack.
        notes: what was left out, and why.
        pictures: (at most 16, 3, H, W) in [0, 1] under attack, those that show the concept first;
            not part of `to_dict`.
    """

    name: str
    rate: float | None
    n: int
    native: float | None
    seconds: float
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pictures: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def hits(self) -> int:
        """Number of trials that show the concept."""
        return 0 if self.rate is None else round(self.rate * self.n)

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the rate; None without one."""
        return None if self.rate is None or not self.n else wilson(self.hits, self.n)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        plain = {name: value for name, value in vars(self).items() if name != "pictures"}
        return plain | {"notes": list(self.notes)}


# ---- who sees the concept -----------------------------------------------------------------------


def judge_logits(judge: ClassifierJudge, factor: str, value: str) -> ScoreFn:
    """What a classifier says to a value against all others of its factor, as a logit.

    Raises:
        ConfigurationError: the judge knows no such factor or value, or is no classifier.
    """
    if not isinstance(judge, ClassifierJudge):
        raise ConfigurationError(
            f"`judge` is a {type(judge).__name__}, whose scores are not differentiable; give a "
            "ClassifierJudge, or a guide by `guide_logits`"
        )
    index = value_index(judge, factor, value)
    sizes = [len(values) for values in judge.factors.values()]
    place = list(judge.factors).index(factor)

    def see(images: Tensor) -> Tensor:
        logits = judge.classifier.logits({"image": images}).split(sizes, dim=1)[place]
        chosen = torch.arange(logits.shape[1], device=logits.device) == index
        rest = logits.masked_fill(chosen, -math.inf).logsumexp(dim=1)
        return cast(Tensor, logits[:, index] - rest)

    return see


def guide_logits(guide: ConceptGuide, concept: int = 0) -> ScoreFn:
    """Margin of one of the concepts of a guide."""
    return lambda images: guide.margins(guide.embed(images))[:, concept]


def guide_sees(guide: ConceptGuide, concept: int = 0) -> JudgeFn:
    """Whether a guide gives one of its concepts a probability above one half."""
    return lambda images: guide.margins(guide.embed(images))[:, concept] > 0


def everybody(*functions: JudgeFn) -> JudgeFn:
    """Whether all of several functions see the concept."""

    def judge_fn(images: Tensor) -> Tensor:
        return torch.stack([one(images) for one in functions]).all(dim=0)

    return judge_fn


# ---- what attacks share -------------------------------------------------------------------------


def check_attack(model: Any, name: str, **counts: float) -> None:
    """Refuse a model without latents, counts below 1 and rates that are not positive.

    Raises:
        CapabilityError: the model is no generator with latents.
        ConfigurationError: names the setting.
    """
    check_capabilities(name, model, (HasLatents,))
    for key, value in counts.items():
        if isinstance(value, int) and value < 1:
            raise ConfigurationError(f"`{key}` is {value}, it must be at least 1")
        if not 0 < value < math.inf:
            raise ConfigurationError(f"`{key}` is {value}, it must be positive")


@dataclass
class Stopwatch:
    """Seconds that have passed, once the block has ended."""

    seconds: float = 0.0


@contextmanager
def attacked(model: Any) -> Iterator[Stopwatch]:
    """Freeze a model for an attack, and take the time."""
    cuda = device_of(model).type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    watch = Stopwatch()
    with frozen(model):
        begin = clock()
        try:
            yield watch
        finally:
            watch.seconds = round(clock() - begin, 3)


def device_of(model: Any) -> torch.device:
    """Where the weights of a model lie."""
    return cast(torch.device, next(model.network.parameters()).device)


def drawn(
    model: Any, n: int, seed: int, purpose: str, space: LatentSpace | None, first: int = 0
) -> Latents:
    """Draw n latents of a space for one purpose, on the device of the model."""
    with torch.no_grad():
        found: Latents = model.mapped(model.draw(n, seed, first, purpose=purpose), space)
    device = device_of(model)
    labels = None if found.labels is None else found.labels.to(device)
    return Latents(found.codes.to(device), labels, found.space)


@torch.no_grad()
def pictures_of(model: Any, latents: Latents) -> Tensor:
    """Draw (n, 3, H, W) pictures of latents in [0, 1], in batches."""
    parts = [
        model.synthesise(latents[start : start + AT_A_TIME]).clamp(0, 1)
        for start in range(0, len(latents), AT_A_TIME)
    ]
    return torch.cat(parts)


@torch.no_grad()
def seen(judge_fn: JudgeFn | ScoreFn, images: Tensor) -> Tensor:
    """(n,) bool on the CPU: what a judge sees, or where logits are above 0.

    Raises:
        ConfigurationError: the function returns anything but one value per picture.
    """
    found = torch.cat([judge_fn(part) for part in images.split(AT_A_TIME)])
    if tuple(found.shape) != (len(images),):
        raise ConfigurationError(
            f"a judge of an attack returns shape {tuple(found.shape)} for {len(images)} images; it "
            "must return one value per image, see `judge_logits` and `mmforget.attacks.sees`"
        )
    return (found if found.dtype == torch.bool else found > 0).cpu()


def shown_first(images: Tensor, hits: Tensor) -> Tensor:
    """The pictures for a report, on the CPU."""
    order = torch.argsort(hits.to(torch.int8), descending=True, stable=True)[:SHOWN]
    return images[order.to(images.device)].float().cpu()


class Region:
    """The latents that an attack may visit, from where it starts.

    An attacker who may go anywhere finds pictures that the generator never draws. In ``z``, codes
    keep the length that they were drawn with, or the bounds of a prior that has some; in ``w`` and
    ``w+``, styles keep their distance to the mean style.

    Args:
        model: the generator.
        start: where the attack starts.
    """

    def __init__(self, model: Any, start: Latents) -> None:
        prior = getattr(model, "prior", "normal")
        self.centre = torch.zeros((), device=start.codes.device)
        self.bound: float | None = None
        if start.space != "z":
            self.centre = model.network.mean_style().to(start.codes)
        elif prior == "uniform":
            self.bound = 1.0
        elif prior == "truncated_normal":
            self.bound = float(model.truncation)
        self.length = (start.codes - self.centre).norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def project(self, codes: Tensor) -> Tensor:
        """Bring codes back into the region."""
        if self.bound is not None:
            return codes.clamp(-self.bound, self.bound)
        away = codes - self.centre
        return self.centre + away * self.length / away.norm(dim=-1, keepdim=True).clamp(min=1e-12)


# ---- comparing models ---------------------------------------------------------------------------

Control = Literal["retrained", "proxy", "none"]


@dataclass(frozen=True)
class AttackComparison:
    """One attack on several models.

    Attributes:
        name: of the attack.
        original: on the model before.
        unlearned: on the model after.
        controls: on the retrained models; or, for the control ``proxy``, on the original for a
            concept that it does not draw.
        control: what the controls are.
        excess: rate of the unlearned model minus that of the highest control; None without one.
        interval: of the excess, 95 %.
    """

    name: str
    original: GeneratorAttackReport
    unlearned: GeneratorAttackReport
    controls: tuple[GeneratorAttackReport, ...]
    control: Control
    excess: float | None
    interval: Interval | None

    @property
    def recovers(self) -> bool | None:
        """Whether the attack brings back more than from the control; None if nobody can say."""
        return None if self.interval is None else self.interval.low > 0

    @property
    def blind(self) -> bool:
        """Whether the attack fails on the original, so that it proves nothing."""
        return self.original.rate is None or self.original.hits == 0

    @property
    def words(self) -> str:
        """The verdict in one sentence."""
        if self.blind:
            return "The attack does not even find the concept in the original model."
        if self.excess is None or self.interval is None:
            return "Without a control, nobody can say what this rate means."
        than = "retrained model" if self.control == "retrained" else "proxy control"
        bounds = f"[{100 * self.interval.low:.0f}, {100 * self.interval.high:.0f}]"
        if self.recovers:
            return f"Recovers more than the {than}, by {100 * self.excess:.0f} points {bounds}."
        return (
            f"Recovers no more than the {than} (difference {100 * self.excess:.0f} points {bounds})"
            "."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        return {
            "name": self.name,
            "original": self.original.to_dict(),
            "unlearned": self.unlearned.to_dict(),
            "controls": [report.to_dict() for report in self.controls],
            "control": self.control,
            "excess": self.excess,
            "interval": None if self.interval is None else dict(vars(self.interval)),
            "recovers": self.recovers,
            "blind": self.blind,
            "words": self.words,
        }


def compare_attack(
    attack: Callable[[Any], GeneratorAttackReport],
    original: Any,
    unlearned: Any,
    retrained: Sequence[Any] = (),
    proxy: Callable[[Any], GeneratorAttackReport] | None = None,
) -> AttackComparison:
    """Run one attack on several models in the same way.

    Args:
        attack: called with a model; everything else is settled, the seed above all.
        original: the model before.
        unlearned: the model after.
        retrained: models that were trained without the concept.
        proxy: the same attack for a concept that the original does not draw, such as a giraffe for
            faces; it is used if there is no retrained model, and run on the original.
    """
    first, second = attack(original), attack(unlearned)
    if retrained:
        return compared(first, second, [attack(model) for model in retrained], "retrained")
    if proxy is not None:
        return compared(first, second, [proxy(original)], "proxy")
    return compared(first, second, [], "none")


def compared(
    original: GeneratorAttackReport,
    unlearned: GeneratorAttackReport,
    controls: Sequence[GeneratorAttackReport],
    control: Control,
) -> AttackComparison:
    """Put the reports of one attack together, with the interval of the difference."""
    known = [report for report in controls if report.rate is not None and report.n]
    excess, interval = None, None
    if known and unlearned.rate is not None and unlearned.n:
        most = max(known, key=lambda report: report.rate or 0.0)
        excess = unlearned.rate - (most.rate or 0.0)
        interval = difference_interval(unlearned.hits, unlearned.n, most.hits, most.n)
    return AttackComparison(
        unlearned.name, original, unlearned, tuple(controls), control, excess, interval
    )


def difference_interval(hits: int, n: int, other_hits: int, other_n: int) -> Interval:
    """95 % interval of the difference of two independent proportions.

    Reference:
        Newcombe, Interval estimation for the difference between independent proportions, 1998
        (method 10, from two Wilson intervals).
    """
    one, other = wilson(hits, n), wilson(other_hits, other_n)
    p, q = hits / n, other_hits / other_n
    low = p - q - math.sqrt((p - one.low) ** 2 + (other.high - q) ** 2)
    high = p - q + math.sqrt((one.high - p) ** 2 + (q - other.low) ** 2)
    return Interval(low, high, "Newcombe")
