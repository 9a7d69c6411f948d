"""The common form of detectors: one score per prompt, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import RequestError, suggest
from mmforget.metrics.detection import detection_scores


@dataclass(frozen=True)
class DetectionReport:
    """How memorized prompts look to a detector.

    Attributes:
        name: of the detector.
        scores: per prompt.
        higher_is_memorized: the direction of the scores.
        protocol: what defines the number; scores of different protocols cannot be compared.
        settings: everything else that shaped it.
        details: per prompt what is particular to the detector.
        queries: evaluations of the denoiser, one per picture and prompt.
        seconds: processor time; on a GPU, time on the clock.
        notes: what was done otherwise than asked for, and why.
    """

    name: str
    scores: dict[str, float]
    higher_is_memorized: bool
    protocol: dict[str, Any]
    settings: dict[str, Any]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    queries: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def of(self, prompts: Sequence[str]) -> Tensor:
        """(P,) scores of some prompts.

        Raises:
            RequestError: a prompt that has no score.
        """
        for prompt in prompts:
            if prompt not in self.scores:
                raise RequestError(
                    f"the detector '{self.name}' has no score for '{prompt}', "
                    f"{suggest(prompt, self.scores)}"
                )
        return torch.tensor([self.scores[prompt] for prompt in prompts], dtype=torch.float64)

    def quality(self, memorized: Sequence[str], ordinary: Sequence[str]) -> dict[str, Any]:
        """How well the scores tell some prompts from others, see `detection_scores`.

        Args:
            memorized: prompts that are known to be memorized.
            ordinary: prompts that are known not to be.

        Raises:
            RequestError: a prompt that has no score.
            DataError: no prompts of one kind.
        """
        return detection_scores(self.of(memorized), self.of(ordinary), self.higher_is_memorized)

    def ranked(self) -> list[tuple[str, float]]:
        """Prompts and scores, the one that looks most memorized first."""
        return sorted(
            self.scores.items(), key=lambda pair: pair[1], reverse=self.higher_is_memorized
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        plain = asdict(self)
        return plain | {"notes": list(self.notes)}
