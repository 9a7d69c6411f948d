"""Memorized subspace: prune the weights that memorized prompts use more than others do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.data.memorized import MemorizedSet
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.activation_statistics import (
    ActivationStatistics,
    RowChoice,
    check_first_steps,
    collect,
    collect_each,
)
from mmforget.methods.pruning import PruningMethod, base_prompts
from mmforget.models.base import Model
from mmforget.models.memory_layers import MemoryKind, MemoryLayer, memory_layers
from mmforget.models.weight_mask import WeightMask

logger = logging.getLogger(__name__)

Combination = Literal["union", "intersection", "majority"]

FEW = 0.01
"""Share of candidates that must be used more by the targets; below it a warning is due."""


class SubspacePruning(PruningMethod):
    r"""Take out the largest ``|W| * activation`` that memorized prompts use more than others.

    Pictures are drawn for the memorized prompts and, from the same noises, for base prompts. At
    each of the first sampling steps the score of a weight is ``|W_ij| a_j``, where ``a_j`` is the
    root mean square of input ``j`` over all tokens, after every token has been divided by its
    length. In every row the ``floor(ratio * inputs)`` largest scores are candidates, and those with
    a larger score than for the base prompts are chosen; since ``|W_ij|`` is the same on both sides,
    that means ``a_j(memorized) > a_j(base)``. The choices of the steps are combined.

    Unlike Wanda, which removes the lowest scores, this removes the highest. Unlike the released
    code, only rows that read the prompts are counted, and means take the place of sums, so that
    both lists of prompts may differ in length.

    Measured on small models (see the benchmark): it damages ordinary pictures before it removes
    what training has spread over all weights. Compare with `RandomPruning` at equal density.

    Reads no pictures.

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`.
        base: prompts that are not memorized; None compares with the empty prompt.
        layers: see `mmforget.models.memory_layers`.
        ratio: share of the inputs of a row that are candidates, above 0 and at most 1.
        first_steps: number of sampling steps, the noisiest ones, that are looked at.
        combine: a weight goes if it is chosen at any of them (``union``), at all of them
            (``intersection``), or at more than half (``majority``).
        per_prompt: locate for each prompt alone, all from one noise, and take what any of them
            chooses; else the statistics are pooled over the prompts.
        steps, guidance: of sampling; None takes the model's.
        rows: ``conditional``, or ``all`` as in the released code.
        row_norm: divide tokens by their length.
        batch_size: pictures at a time.

    Raises:
        ConfigurationError: a setting out of range, or a layer too narrow for `ratio`.
        RequestError: a base prompt that is memorized.

    Reference:
        Chavhan et al., Memorized Images in Diffusion Models share a Subspace that can be Located
        and Deleted, 2024, arXiv 2406.18566; ConceptPrune, 2024, arXiv 2405.19237.
    """

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        base: Sequence[str] | None = None,
        layers: MemoryKind = "ffn_out",
        ratio: float = 0.01,
        first_steps: int = 10,
        combine: Combination = "union",
        per_prompt: bool = False,
        steps: int | None = None,
        guidance: float | None = None,
        rows: RowChoice = "conditional",
        row_norm: bool = True,
        batch_size: int = 32,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        if combine not in get_args(Combination):
            raise ConfigurationError(
                f"`combine` is '{combine}', {suggest(combine, get_args(Combination))}"
            )
        if rows not in get_args(RowChoice):
            raise ConfigurationError(f"`rows` is '{rows}', {suggest(rows, get_args(RowChoice))}")
        if per_prompt and rows != "conditional":
            raise ConfigurationError(
                f"`per_prompt` needs rows='conditional', not '{rows}', because the other rows do "
                "not belong to one prompt"
            )
        checked = base_prompts(memorized, base)
        super().__init__(model, memorized, copy=copy, seed=seed)
        self.base, self.kind, self.ratio = checked, layers, ratio
        self.first_steps, self.combine, self.per_prompt = first_steps, combine, per_prompt
        self.steps, self.guidance, self.rows = steps, guidance, rows
        self.row_norm, self.batch_size = row_norm, batch_size
        if checked is not None:
            self.model.check_length(checked)
        self.layers = memory_layers(self.model, layers)
        for layer in self.layers:
            candidates(layer, ratio)
        check_first_steps(first_steps, self.model.steps if steps is None else steps)

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the mask."""
        return {
            "base": None if self.base is None else list(self.base),
            "layers": self.kind,
            "ratio": self.ratio,
            "first_steps": self.first_steps,
            "combine": self.combine,
            "per_prompt": self.per_prompt,
            "steps": self.steps,
            "guidance": self.guidance,
            "rows": self.rows,
            "row_norm": self.row_norm,
        }

    def locate(self) -> WeightMask:
        """Collect statistics of both lists of prompts, and choose."""
        texts = self.memorized.texts
        given: dict[str, Any] = {
            "steps": self.steps,
            "guidance": self.guidance,
            "first_steps": self.first_steps,
            "seed": self.seed,
            "rows": self.rows,
            "row_norm": self.row_norm,
            "batch_size": self.batch_size,
        }
        # One noise for all prompts alone: then one picture of the base prompt serves all of them.
        count = 1 if self.per_prompt else len(texts)
        others = self.base or ("",) * count
        numbers = [0] * len(others) if self.per_prompt else None
        base = collect(self.model, others, self.layers, numbers=numbers, **given)
        self.spend(retain=base.passes)
        if self.per_prompt:
            masks: dict[str, Tensor] = {}
            zeros = [0] * len(texts)
            for one in collect_each(self.model, texts, self.layers, numbers=zeros, **given):
                self.spend(forget=one.passes)
                own = difference_masks(self.layers, one, base, self.ratio, self.combine)
                masks = {name: masks[name] | m if masks else m for name, m in own.items()}
        else:
            target = collect(self.model, texts, self.layers, **given)
            self.spend(forget=target.passes)
            masks = difference_masks(self.layers, target, base, self.ratio, self.combine)
        columns = {
            layer.weight_name: [layer.columns.start, layer.columns.stop] for layer in self.layers
        }
        return self.described(masks, unit="weight", columns=columns)


def candidates(layer: MemoryLayer, ratio: float) -> int:
    """Number of weights per row that a ratio amounts to.

    Args:
        layer: where.
        ratio: share of the inputs.

    Raises:
        ConfigurationError: a ratio out of range, or too small for this layer.
    """
    if not 0 < ratio <= 1:
        raise ConfigurationError(f"`ratio` is {ratio}, it must be above 0 and at most 1")
    # A product such as 0.29 * 100 lies a little below the whole number that it means.
    count = math.floor(ratio * layer.width + 1e-9)
    if count < 1:
        raise ConfigurationError(
            f"`ratio` is {ratio}, which is less than one of the {layer.width} inputs of "
            f"'{layer.name}'; give at least {math.ceil(1e4 / layer.width) / 1e4:g}"
        )
    return count


@torch.no_grad()
def difference_masks(
    layers: Sequence[MemoryLayer],
    target: ActivationStatistics,
    base: ActivationStatistics,
    ratio: float = 0.01,
    combine: Combination = "union",
) -> dict[str, Tensor]:
    """Choose weights by the statistics of two lists of prompts, see `SubspacePruning`.

    Args:
        layers: those that the statistics belong to.
        target: of the memorized prompts; all its times are looked at.
        base: of the others.
        ratio: share of the inputs of a row that are candidates.
        combine: of the choices at several times.

    Returns:
        Per parameter name (out, in) bool, on the CPU.

    Raises:
        ConfigurationError: a ratio out of range or too small, a time that the base lacks.
        WeightsError: statistics of another network.
    """
    target.check_against(base)
    enough: dict[Combination, Callable[[Tensor, int], Tensor]] = {
        "union": lambda votes, steps: votes > 0,
        "intersection": lambda votes, steps: votes == steps,
        "majority": lambda votes, steps: 2 * votes > steps,
    }
    masks = {}
    for layer in layers:
        count = candidates(layer, ratio)
        weight = layer.weight.float().abs()
        votes = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
        used, times = 0, target.times
        for time in times:
            mine, theirs = (s.size(layer.name, time).to(weight) for s in (target, base))
            top = (weight * mine).topk(count, dim=1).indices
            # A weight of zero has no score that could be the larger one.
            chosen = (mine > theirs)[top] & (weight.gather(1, top) > 0)
            votes.scatter_add_(1, top, chosen.int())
            used += int(chosen.sum())
        if used < FEW * count * len(weight) * len(times):
            logger.warning(
                "'%s': of the candidates for pruning, only %.1f%% are used more by the memorized "
                "prompts than by the base; almost nothing is taken out",
                layer.name,
                100 * used / (count * len(weight) * len(times)),
            )
        mask = torch.zeros(layer.module.weight.shape, dtype=torch.bool)
        mask[layer.rows, layer.columns] = enough[combine](votes, len(times)).cpu()
        masks[layer.weight_name] = mask
    return masks
