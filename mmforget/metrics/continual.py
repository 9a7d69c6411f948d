"""What tuning on one task after another costs: the matrix of scores, and two kinds of forgetting.

Entry ``P[i, j]`` of a score matrix is the performance on task j after training on task i; entries
that were not measured are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mmforget.errors import DataError
from mmforget.metrics.answers import check_lengths, exact_match, mentions, option_letter
from mmforget.metrics.rates import Mean, Scores


class ScoreMatrix:
    """Scores of every task after every task; see the module.

    All results are None where they would need an entry that was not measured, or a task more.

    Args:
        values: (T, T) scores, larger is better; row i is the model after task i.
        untrained: (T,) scores before the first task, for `forward_transfer`.
        tasks: their names, in the order of training.

    Raises:
        DataError: no square matrix, or as many other numbers as tasks are needed.

    Reference:
        Lopez-Paz and Ranzato, Gradient episodic memory for continual learning, 2017,
        arXiv 1706.08840.
    """

    def __init__(
        self,
        values: ArrayLike,
        untrained: ArrayLike | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.values = np.asarray(values, dtype=np.float64)
        size = len(self.values) if self.values.ndim else 0
        if not size or self.values.shape != (size, size):
            raise DataError(
                f"the score matrix has the shape {self.values.shape}; give one row and one column "
                "per task"
            )
        self.untrained = None if untrained is None else np.asarray(untrained, dtype=np.float64)
        self.tasks = tuple(tasks) if tasks is not None else tuple(str(n) for n in range(size))
        for name, shape in (
            ("untrained", None if self.untrained is None else self.untrained.shape),
            ("tasks", (len(self.tasks),)),
        ):
            if shape is not None and shape != (size,):
                raise DataError(
                    f"`{name}` has the shape {shape}, but there are {size} tasks; give one per task"
                )

    @property
    def average_performance(self) -> float | None:
        """AP: mean over all tasks after the last one."""
        return _mean(self.values[-1])

    @property
    def changes(self) -> list[float | None]:
        """Per task ``P[T-1, j] - P[j, j]``: negative is forgetting; 0 for the last task."""
        found = self.values[-1] - self.values.diagonal()
        return [None if np.isnan(value) else float(value) for value in found]

    @property
    def backward_transfer(self) -> float | None:
        """BWT: mean of `changes` over all tasks but the last; None for a single task."""
        return _mean((self.values[-1] - self.values.diagonal())[:-1])

    @property
    def mean_average_accuracy(self) -> float | None:
        """MAA: mean over the tasks of the mean over all tasks seen so far."""
        seen = [_mean(row[: number + 1]) for number, row in enumerate(self.values)]
        return None if None in seen else float(np.mean([one for one in seen if one is not None]))

    @property
    def forward_transfer(self) -> float | None:
        """FWT: mean gain on a task right before it is trained on, against the untrained model."""
        if self.untrained is None:
            return None
        return _mean(self.values.diagonal(offset=1) - self.untrained[1:])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the matrix and everything made of it."""
        return {
            "tasks": list(self.tasks),
            "matrix": [[None if np.isnan(v) else float(v) for v in row] for row in self.values],
            "average_performance": self.average_performance,
            "changes": self.changes,
            "backward_transfer": self.backward_transfer,
            "mean_average_accuracy": self.mean_average_accuracy,
            "forward_transfer": self.forward_transfer,
        }


def _mean(values: np.ndarray) -> float | None:
    return None if not len(values) or np.isnan(values).any() else float(values.mean())


# ---- superficial and essential forgetting -------------------------------------------------------


class ForgettingKinds(NamedTuple):
    """Accuracy lost on earlier tasks, by what was lost.

    Attributes:
        superficial: the fact is still there, but not in the format that was asked for.
        essential: the fact is gone.
    """

    superficial: float
    essential: float

    @property
    def total(self) -> float:
        """Both: the loss that an evaluation by format sees."""
        return self.superficial + self.essential


def forgetting_kinds(
    fact_before: Mean, fact_after: Mean, strict_after: Mean
) -> ForgettingKinds | None:
    """Split the loss on an earlier task.

    ``essential = fact_before - fact_after`` and ``superficial = fact_before - strict_after -
    essential``, that is ``fact_after - strict_after``.

    Args:
        fact_before: accuracy of the facts right after the task, see `style_scores`.
        fact_after: the same after later tasks.
        strict_after: accuracy of fact and format after later tasks.

    Returns:
        None if one of them has no samples.

    Reference:
        Chen et al., SEFE: Superficial and essential forgetting eliminator for multimodal continual
        instruction tuning, 2025, arXiv 2505.02486.
    """
    before, after, strict = fact_before.value, fact_after.value, strict_after.value
    if before is None or after is None or strict is None:
        return None
    return ForgettingKinds(superficial=after - strict, essential=before - after)


def style_scores(
    answers: Sequence[str],
    truths: Sequence[str],
    options: Sequence[Sequence[str] | None] | None = None,
) -> dict[str, Scores]:
    """Right answers in the format that was asked for (``strict``), and in any (``fact``).

    Args:
        answers: what was said.
        truths: what is right, in the format asked for: a letter where there are options.
        options: per question the texts of its options, from A; None for a question without.

    Returns:
        ``strict``: nothing but the right words, or with options an answer that begins with the
        right letter. ``fact``: the right words anywhere in the answer, or with options the letter,
        or the text of the right option without that of another one.

    Raises:
        DataError: different numbers of answers, truths and lists of options, or a truth that is
            none of the letters.
    """
    choices = [None] * len(answers) if options is None else list(options)
    check_lengths(answers=answers, truths=truths, options=choices)
    strict, fact = [], []
    for answer, truth, texts in zip(answers, truths, choices, strict=True):
        if texts is None:
            strict.append(exact_match(answer, truth))
            fact.append(mentions(answer, truth))
            continue
        place = ord(truth.upper()) - ord("A") if len(truth) == 1 else -1
        if not 0 <= place < len(texts):
            raise DataError(
                f"the right option is '{truth}', but there are {len(texts)} from A; give its letter"
            )
        letter = option_letter(answer, len(texts))
        named = [row for row, text in enumerate(texts) if mentions(answer, text)]
        strict.append(letter == truth.upper())
        fact.append(strict[-1] if letter is not None else named == [place])
    return {"strict": Scores.of(strict), "fact": Scores.of(fact)}
