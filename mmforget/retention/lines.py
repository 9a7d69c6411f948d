"""LiNeS: scale by depth what training has changed; also for unlearning, and to merge tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError, DataError, WeightsError, suggest
from mmforget.methods.base import detached_copy
from mmforget.models.base import Model, Sites

Block = Callable[[str], tuple[str, int] | None]
"""Maps the name of a weight to its tower and the number of its block; None outside of blocks."""

Combine = Literal["sum", "mean", "max"]
State = Mapping[str, Tensor]

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Ramp:
    """Factors from the first to the last block of a tower: ``alpha + beta * l / (L - 1)``.

    Attributes:
        alpha: factor of the first block, and of what lies outside of blocks.
        beta: what is added up to the last block; a tower of one block takes all of it.
    """

    alpha: float
    beta: float

    @staticmethod
    def up_from(alpha: float) -> Ramp:
        """From alpha to 1: shallow blocks go back, deep ones keep all of their change (paper)."""
        return Ramp(alpha, 1 - alpha)

    @staticmethod
    def down_to(alpha: float) -> Ramp:
        """From 1 to alpha: the reverse."""
        return Ramp(1.0, alpha - 1)

    def factor(self, block: int, blocks: int) -> float:
        """Factor of one of `blocks` blocks, counted from 0."""
        return self.alpha + self.beta * (block / (blocks - 1) if blocks > 1 else 1.0)


class LiNeS:
    r"""Scale a task vector by depth: ``theta = before + factor(l) * (after - before)``.

    What was tuned keeps the deep, task-specific part of its change, and gives up the shallow one,
    which costs other abilities most. Used on an unlearned model (`before` is the original) it
    limits the damage of unlearning, at the price of forgetting less: look at both along a
    `scaling_curve`. Merge adapters first.

    Vision and language towers have their own ramps, found through the module tree; the released
    code looks for ``.3.`` in names, which confuses towers and hits layers of projectors.

    Args:
        ramp: one for all towers, or one per tower, such as ``vision`` and ``language``. A tower
            that is not named keeps all of its change.
        outside: factors of the parts outside of blocks, such as ``projector`` and ``head``. By
            default a part takes the alpha of the ramp of its own name, else that of ``language``
            or of the only ramp.

    Raises:
        ConfigurationError: no ramp.

    Reference:
        Wang et al., LiNeS: Post-training layer scaling prevents forgetting and enhances model
        merging, ICLR 2025, arXiv 2410.17146. Use on unlearned models and separate ramps are ours.
    """

    def __init__(
        self, ramp: Ramp | Mapping[str, Ramp], outside: Mapping[str, float] | None = None
    ) -> None:
        if not isinstance(ramp, Ramp) and not ramp:
            raise ConfigurationError("`ramp` is empty; give a Ramp, or one per tower")
        self.ramp = ramp if isinstance(ramp, Ramp) else dict(ramp)
        self.outside = dict(outside or {})

    def factors(
        self, names: Iterable[str], block: Block, part: Callable[[str], str] | None = None
    ) -> dict[str, float]:
        """Factor of every weight.

        Args:
            names: of all weights, as in memory.
            block: see `Block`.
            part: part of the network that a weight outside of blocks belongs to.

        Raises:
            ConfigurationError: no weight lies in a block, or a ramp or part that does not exist.
        """
        names = list(names)
        places = {name: block(name) for name in names}
        depth: dict[str, int] = {}
        for place in places.values():
            if place is not None:
                depth[place[0]] = max(depth.get(place[0], 0), place[1] + 1)
        if not depth:
            raise ConfigurationError(
                "none of the weights lies in a block; give a `block` function that knows the names"
            )
        parts = {name: part(name) if part else "" for name, place in places.items() if not place}
        self._check_names(depth, set(parts.values()) if part else set())
        found = {}
        for name, place in places.items():
            if place is None:
                found[name] = self._outside(parts[name])
            else:
                ramp = self.ramp if isinstance(self.ramp, Ramp) else self.ramp.get(place[0])
                found[name] = 1.0 if ramp is None else ramp.factor(place[1], depth[place[0]])
        return found

    def _check_names(self, towers: Mapping[str, int], parts: set[str]) -> None:
        ramps = () if isinstance(self.ramp, Ramp) else self.ramp
        for field, given, known in (("ramp", ramps, towers), ("outside", self.outside, parts)):
            for name in given:
                if name not in known:
                    raise ConfigurationError(f"`{field}` names '{name}', {suggest(name, known)}")

    def _outside(self, part: str) -> float:
        if part in self.outside:
            return self.outside[part]
        if isinstance(self.ramp, Ramp):
            return self.ramp.alpha
        for name in (part, "language"):
            if name in self.ramp:
                return self.ramp[name].alpha
        return next(iter(self.ramp.values())).alpha if len(self.ramp) == 1 else 1.0

    def apply(self, before: Model, after: Model, block: Block | None = None) -> Model:
        """Return a copy of `after` with scaled changes; both models are left as they are.

        Args:
            before: the model before it was tuned.
            after: the same model tuned or unlearned, adapters merged.
            block: see `Block`; None finds the blocks by `blocks_of`.

        Raises:
            WeightsError: the two models do not have the same weights.
            ConfigurationError: see `factors`; or tied weights that get different factors.
            CapabilityError: the blocks cannot be found.
        """
        own, other = before.network.state_dict(), after.network.state_dict()
        factors = self.factors(other, *_structure(after, block))
        result = detached_copy(after)
        result.network.load_state_dict(scaled(own, other, factors))
        return result.eval()


def blocks_of(model: Model) -> tuple[Block, Callable[[str], str] | None]:
    """Where the blocks of a model are: of a multimodal one by its family, else by its `Sites`.

    Returns:
        The `Block` function, whose only tower is ``blocks`` unless the family knows several, and
        the function that names parts, or None.

    Raises:
        CapabilityError: the model offers neither.
    """
    family: Any = getattr(model, "family", None)
    if hasattr(family, "block") and hasattr(family, "part"):
        return family.block, family.part
    if not isinstance(model, Sites):
        raise CapabilityError(
            f"the blocks of {type(model).__name__} are not known, since it does not offer `Sites`; "
            "give a `block` function"
        )
    names = list(dict.fromkeys(site.block for site in model.sites("ffn")))

    def block(name: str) -> tuple[str, int] | None:
        for number, prefix in enumerate(names):
            if name.startswith(prefix + "."):
                return "blocks", number
        return None

    return block, None


def _structure(model: Model, block: Block | None) -> tuple[Block, Callable[[str], str] | None]:
    return blocks_of(model) if block is None else (block, None)


@torch.no_grad()
def scaled(before: State, after: State, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Weights on the way from one state to another, each as far as its factor says.

    Factors of exactly 0 and 1 give the given bits. What is no floating-point number, such as a
    count, is taken from `after`.

    Raises:
        WeightsError: the states do not have the same names and shapes.
        ConfigurationError: tied weights with different factors.
    """
    check_states(before, after)
    shared: dict[tuple[int, tuple[int, ...]], str] = {}
    result = {}
    for name, tuned in after.items():
        factor = factors[name]
        other = shared.setdefault((tuned.data_ptr(), tuple(tuned.shape)), name)
        if factors[other] != factor and tuned.numel():
            raise ConfigurationError(
                f"'{other}' and '{name}' are one tied weight, but get the factors "
                f"{factors[other]:g} and {factor:g}; give their parts the same one"
            )
        base = before[name].to(tuned.device)
        if factor == 1 or not tuned.is_floating_point():
            result[name] = tuned.clone()
        elif factor == 0:
            result[name] = base.clone()
        else:
            change = tuned.double() - base.double()
            result[name] = (base.double() + factor * change).to(tuned.dtype)
    return result


def check_states(before: State, after: State) -> None:
    """Refuse two states that are not of one architecture.

    Raises:
        WeightsError: names the first difference.
    """
    for name in [*after, *before]:
        if name not in before or name not in after:
            adapter = "; merge the adapters first" if "lora_" in name else ""
            raise WeightsError(
                f"the weight '{name}' exists in one of the two models only{adapter or ''}"
                + ("" if adapter else "; give two states of one architecture")
            )
        if before[name].shape != after[name].shape:
            raise WeightsError(
                f"the weight '{name}' has the shape {tuple(before[name].shape)} before and "
                f"{tuple(after[name].shape)} after; give two states of one architecture"
            )


@torch.no_grad()
def merge_tasks(
    before: Model,
    tuned: Sequence[Model],
    beta: float,
    combine: Combine = "sum",
    block: Block | None = None,
) -> Model:
    """Merge models that were tuned on one task each, the changes scaled by depth.

    The combined task vector ``t`` of K tasks is scaled from
    ``alpha = |sum of task vectors| / |t| / K`` (Euclidean norms) to ``alpha + beta``.

    Args:
        before: the model that all were tuned from.
        tuned: one or more models, adapters merged.
        beta: to be chosen on validation data; 0 scales all blocks alike.
        combine: ``sum`` (task arithmetic), ``mean``, or ``max``: per weight the change of the
            largest size.
        block: see `LiNeS.apply`.

    Raises:
        DataError: no models.
        ConfigurationError: an unknown way to combine.
        WeightsError: the models do not have the same weights, or none has changed.
    """
    if not tuned:
        raise DataError("there are no models to merge; give at least one")
    if combine not in get_args(Combine):
        raise ConfigurationError(f"`combine` is '{combine}', {suggest(combine, get_args(Combine))}")
    base = before.network.state_dict()
    states = [model.network.state_dict() for model in tuned]
    vectors: dict[str, Tensor] = {}
    square_sum = square_combined = 0.0
    for state in states:
        check_states(base, state)
    for name, start in base.items():
        if not start.is_floating_point():
            continue
        changes = torch.stack([state[name].to(start.device).double() - start for state in states])
        total = changes.sum(dim=0)
        if combine == "max":
            combined = changes.gather(0, changes.abs().argmax(dim=0, keepdim=True))[0]
        else:
            combined = total if combine == "sum" else total / len(states)
        vectors[name] = combined
        square_sum += float(total.square().sum())
        square_combined += float(combined.square().sum())
    if not square_combined:
        raise WeightsError("none of the models differs from the one before; there is nothing to do")
    alpha = (square_sum / square_combined) ** 0.5 / len(states)
    factors = LiNeS(Ramp(alpha, beta)).factors(base, *_structure(before, block))
    result = detached_copy(tuned[0])
    merged = dict(states[0])
    for name, vector in vectors.items():
        merged[name] = (base[name].double() + factors[name] * vector).to(base[name].dtype)
    result.network.load_state_dict(merged)
    return result.eval()


def scaling_curve(
    before: Model,
    after: Model,
    measure: Callable[[Model], Mapping[str, float | None]],
    alphas: Sequence[float] = ALPHAS,
    ramp: Callable[[float], Ramp | Mapping[str, Ramp]] = Ramp.up_from,
    outside: Mapping[str, float] | None = None,
    block: Block | None = None,
) -> list[dict[str, Any]]:
    """Measure a tuned or unlearned model at several strengths of scaling.

    ::

        rows = scaling_curve(original, unlearned, lambda model: {"forget": …, "utility": …})

    Args:
        before: see `LiNeS.apply`.
        after: see there.
        measure: called with each scaled model, which it must not keep.
        alphas: 1 is `after` as it is.
        ramp: makes the ramps of an alpha; `Ramp.down_to` scales deep blocks instead.
        outside: see `LiNeS`.
        block: see `LiNeS.apply`.

    Returns:
        Per alpha a row with ``alpha`` and what was measured.
    """
    own, other = before.network.state_dict(), after.network.state_dict()
    structure = _structure(after, block)
    model = detached_copy(after).eval()
    rows = []
    for alpha in alphas:
        factors = LiNeS(ramp(alpha), outside).factors(other, *structure)
        model.network.load_state_dict(scaled(own, other, factors))
        rows.append({"alpha": alpha, **measure(model)})
    return rows


def best_scaling(
    rows: Sequence[Mapping[str, Any]],
    tuned: float,
    untuned: float,
    target: str = "target",
    control: str = "control",
) -> Mapping[str, Any]:
    """The row that keeps most of both: ``2 * target / tuned + control / untuned``.

    Choose on validation data.

    Args:
        rows: of `scaling_curve`.
        tuned: target measure of the model as it was tuned, positive.
        untuned: control measure of the model before, positive.
        target: name of the measure of what was tuned for.
        control: name of the measure of everything else.

    Raises:
        DataError: no rows, or a reference that is not positive.
    """
    if not rows or not tuned > 0 or not untuned > 0:
        raise DataError(
            f"there are {len(rows)} rows and the references {tuned:g} and {untuned:g}; give at "
            "least one row and positive references"
        )
    return max(rows, key=lambda row: 2 * row[target] / tuned + row[control] / untuned)
