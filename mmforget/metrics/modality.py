"""Through which door a fact can still be reached: picture, text, or both together.

Forgetting with pictures does not imply forgetting with text: a model may no longer name a person in
a picture and still say everything when the name is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.metrics.rates import Mean

ROLES = ("forget", "retain")
PROMPTS = ("image", "text", "both")
"""``image``: the picture, and a question that does not name what is on it. ``text``: a question
that names it, without picture. ``both``: the picture, and a question that names it."""


class ModalityCells(NamedTuple):
    """Means by role and kind of prompt.

    Attributes:
        cells: role, then kind of prompt, to the mean; all of them, also those without samples.
    """

    cells: dict[str, dict[str, Mean]]

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows for a table: role, prompt, value, n."""
        return [
            {"role": role, "prompt": prompt, "value": mean.value, "n": mean.n}
            for role, row in self.cells.items()
            for prompt, mean in row.items()
        ]

    def gap(self, role: str = "forget", first: str = "text", second: str = "image") -> float | None:
        """How much better prompts of one kind do than those of another; None without samples.

        By default: what is left to be said about the forget set by text, beyond what pictures
        still bring out.
        """
        one, other = self.cells[role][first].value, self.cells[role][second].value
        return None if one is None or other is None else one - other


class ModalityTable(Metric):
    """Share of right answers by role and kind of prompt; several processes equal one.

    Args:
        prompts: kinds of prompts, such as ``other_image`` in addition to `PROMPTS`.

    Raises:
        ConfigurationError: kinds that are none or not distinct.
    """

    full_state_update = False
    higher_is_better = None
    totals: Tensor
    counts: Tensor

    def __init__(self, prompts: Sequence[str] = PROMPTS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(prompts, str) or not prompts or len(set(prompts)) != len(prompts):
            raise ConfigurationError(f"`prompts` is {prompts!r}; give distinct names in a list")
        self.prompts = tuple(prompts)
        shape = (len(ROLES), len(self.prompts))
        self.add_state("totals", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros((*shape, 2), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, scores: Sequence[float | bool | None], roles: Sequence[str], prompts: Sequence[str]
    ) -> None:
        """Add samples.

        Args:
            scores: 1 for a right answer, 0 for another; None for one that could not be judged.
            roles: ``forget`` or ``retain`` each.
            prompts: kind of prompt of each.

        Raises:
            ConfigurationError: an unknown role or kind of prompt.
            DataError: lists of different lengths.
        """
        if not len(scores) == len(roles) == len(prompts):
            raise DataError(
                f"there are {len(scores)} scores, {len(roles)} roles and {len(prompts)} prompts; "
                "give one of each per sample"
            )
        for score, role, prompt in zip(scores, roles, prompts, strict=True):
            row = _place("roles", role, ROLES)
            column = _place("prompts", prompt, self.prompts)
            if score is None:
                self.counts[row, column, 1] += 1
            else:
                self.totals[row, column] += float(score)
                self.counts[row, column, 0] += 1

    def compute(self) -> dict[str, Mean]:
        """Return the means, named ``forget/image`` and so on."""
        totals, counts = self.totals.tolist(), self.counts.tolist()
        return {
            f"{role}/{prompt}": Mean(totals[row][column], *counts[row][column])
            for row, role in enumerate(ROLES)
            for column, prompt in enumerate(self.prompts)
        }

    def table(self) -> ModalityCells:
        """The means over all processes as a table."""
        found = self.compute()
        return ModalityCells(
            {role: {one: found[f"{role}/{one}"] for one in self.prompts} for role in ROLES}
        )


def _place(field: str, name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ConfigurationError(f"`{field}` names '{name}', {suggest(name, names)}")
    return names.index(name)
