"""`torchmetrics.Metric` classes over answers in words; several processes give the result of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mmforget.metrics.answer_judges import AnswerJudge, TargetJudge, judged
from mmforget.metrics.answers import (
    ROUGE_NAMES,
    exact_matches,
    option_scores,
    refusal_scores,
    rouge_scores,
    safe_answer_scores,
)
from mmforget.metrics.rates import ScoreMetric, Scores

Reference = str | Sequence[str]


class Rouge(ScoreMetric):
    """Means of `rouge` by the names in `ROUGE_NAMES`; update with answers and references."""

    higher_is_better = None
    names: ClassVar[tuple[str, ...]] = ROUGE_NAMES

    def scores(self, answers: Sequence[str], references: Sequence[Reference]) -> dict[str, Scores]:
        """See `rouge_scores`."""
        return rouge_scores(answers, references)


class ExactMatch(ScoreMetric):
    """Share of answers that are right after normalisation; update with answers and references."""

    higher_is_better = None
    names: ClassVar[tuple[str, ...]] = ("exact_match",)

    def scores(self, answers: Sequence[str], references: Sequence[Reference]) -> dict[str, Scores]:
        """See `exact_matches`."""
        return {"exact_match": exact_matches(answers, references)}


class OptionAccuracy(ScoreMetric):
    """Accuracy of letters and share of answers without one; update with answers and letters.

    Args:
        options: how many options every question has.
    """

    higher_is_better = None
    names: ClassVar[tuple[str, ...]] = ("accuracy", "invalid")

    def __init__(self, options: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options

    def scores(self, answers: Sequence[str], letters: Sequence[str]) -> dict[str, Scores]:
        """See `option_scores`."""
        return option_scores(answers, letters, self.options)


class AttackSuccess(ScoreMetric):
    """Share of answers that reveal a target; update with questions, answers and targets.

    Args:
        judge: None looks for the targets as whole words.
        samples: answers per prompt, see `judged`.
    """

    higher_is_better = False
    names: ClassVar[tuple[str, ...]] = ("attack_success",)

    def __init__(self, judge: AnswerJudge | None = None, samples: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge: AnswerJudge = judge or TargetJudge()
        self.samples = samples

    def scores(
        self, questions: Sequence[str], answers: Sequence[str], targets: Sequence[Reference]
    ) -> dict[str, Scores]:
        """See `judged`."""
        return {"attack_success": judged(self.judge, questions, answers, targets, self.samples)}


class RefusalRate(ScoreMetric):
    """Share of answers that begin with a refusal; update with answers.

    Args:
        languages: see `is_refusal`.
        extra: see `is_refusal`.
    """

    higher_is_better = None
    names: ClassVar[tuple[str, ...]] = ("refusal",)

    def __init__(
        self, languages: Sequence[str] | None = None, extra: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.languages, self.extra = languages, tuple(extra)

    def scores(self, answers: Sequence[str]) -> dict[str, Scores]:
        """See `refusal_scores`."""
        return {"refusal": refusal_scores(answers, self.languages, self.extra)}


class SafeAnswerRefusal(ScoreMetric):
    """SARR and its strict form; update with answers and references, and losses if measured.

    Args:
        most_loss: see `is_gibberish`.
        languages: see `is_refusal`.
        extra: see `is_refusal`.
        repeats: see `is_gibberish`.
    """

    higher_is_better = False
    names: ClassVar[tuple[str, ...]] = ("sarr", "sarr_strict", "refusal", "gibberish")

    def __init__(
        self,
        most_loss: float | None = None,
        languages: Sequence[str] | None = None,
        extra: Sequence[str] = (),
        repeats: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.most_loss, self.languages, self.extra = most_loss, languages, tuple(extra)
        self.repeats = repeats

    def scores(
        self,
        answers: Sequence[str],
        references: Sequence[Reference],
        losses: Sequence[float] | None = None,
    ) -> dict[str, Scores]:
        """See `safe_answer_scores`."""
        return safe_answer_scores(
            answers,
            references,
            losses,
            self.most_loss,
            self.languages,
            self.extra,
            self.repeats,
        )
