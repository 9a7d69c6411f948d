"""Agreement of pictures with texts: CLIPScore, and zero-shot probability of a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmforget.errors import DataError
from mmforget.metrics.judge import Judge, value_index
from mmforget.models.clip import ClipModel

CLIPSCORE_WEIGHT = 2.5


def clip_score(cosine: Tensor, weight: float = CLIPSCORE_WEIGHT) -> Tensor:
    """CLIPScore per pair: weight * max(cos, 0), in [0, weight]. Shape: (N,) to (N,)."""
    return weight * cosine.clamp(min=0)


class CLIPScore(Metric):
    """Mean `clip_score` of pictures and the texts they were made for.

    With the weight 100 it is the scale of torchmetrics, which cuts negative values only after
    averaging; the difference vanishes unless some cosine is negative.

    Args:
        model: a CLIP model whose encoders had no part in making or changing the pictures.
        weight: 2.5 in the paper.

    Reference:
        Hessel et al., CLIPScore: a reference-free evaluation metric for image captioning, 2021,
        arXiv 2104.08718.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, model: ClipModel, weight: float = CLIPSCORE_WEIGHT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # As a submodule, its weights would be trained and saved with whatever owns the metric.
        self._model = (model,)
        self.weight = weight
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def model(self) -> ClipModel:
        """What embeds pictures and texts."""
        return self._model[0]

    @torch.no_grad()
    def per_sample(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return (B,) scores of (B, 3, H, W) images in [0, 1] and B texts.

        Raises:
            DataError: not as many texts as images.
            RequestError: a text is longer than the text encoder reads.
        """
        if isinstance(texts, str) or len(texts) != len(images):
            raise DataError(
                f"CLIPScore needs one text per image; got {len(images)} images and "
                f"{1 if isinstance(texts, str) else len(texts)} texts"
            )
        if not len(images):
            return torch.zeros(0, dtype=torch.float64)
        pairs = self.model.encode_images(images) * self.model.encode_texts(texts)
        return clip_score(pairs.double().sum(1), self.weight)

    def update(self, images: Tensor, texts: Sequence[str]) -> None:
        """Add (B, 3, H, W) images in [0, 1] and B texts."""
        values = self.per_sample(images, texts)
        self.total += values.sum().to(self.total.device)
        self.count += len(values)

    def compute(self) -> Tensor:
        """Return the mean.

        Raises:
            DataError: there was no picture.
        """
        if not self.count:
            raise DataError("CLIPScore has seen no pictures; update it before `compute`")
        return self.total / self.count


class ConceptProbability(Metric):
    """How sure a judge is that pictures show a concept, and how often it comes first.

    With a `ClipJudge`, the zero-shot probability softmax(100 cos) among a closed list of values.

    Args:
        judge: reads the pictures.
        factor: one of its factors, such as ``digit``.
        target: one of the values of that factor.

    Raises:
        ConfigurationError: an unknown factor or value.
    """

    full_state_update = False
    higher_is_better = None
    total: Tensor
    hits: Tensor
    count: Tensor

    def __init__(self, judge: Judge, factor: str, target: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge, self.factor, self.target = judge, factor, target
        self.index = value_index(judge, factor, target)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("hits", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Add (B, 3, H, W) images in [0, 1]."""
        if not len(images):
            return
        probability = self.judge(images)[self.factor]
        self.total += probability[:, self.index].double().sum().to(self.total.device)
        self.hits += (probability.argmax(1) == self.index).sum().to(self.hits.device)
        self.count += len(images)

    def compute(self) -> dict[str, Tensor]:
        """Return ``probability``, the mean, and ``rate``, the share judged as the target.

        Raises:
            DataError: there was no picture.
        """
        if not self.count:
            raise DataError(
                f"the probability of '{self.target}' has seen no pictures; update it before "
                "`compute`"
            )
        return {
            "probability": self.total / self.count,
            "rate": self.hits.double() / self.count,
        }
