"""How much a picture shows what a text names: what text-guided editing of generators follows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, RequestError, suggest
from mmforget.models.base import state_hash
from mmforget.models.clip import ClipModel, load_clip

logger = logging.getLogger(__name__)

NEUTRAL = "a picture"
"""What a concept is told from if nothing else is named."""

MAX_SIMILARITY = 0.98
NEGATIONS = ("no", "not", "without", "non")


class ConceptGuide:
    """Margins of concepts over their alternatives, by one CLIP model or several.

    With e the embedding of a picture, t the concept's and a_j those of its alternatives, all of
    length 1, and s the scale of the CLIP model, the margin is ``s e.t - logsumexp_j s e.a_j``; its
    sigmoid is the probability of the concept. Several CLIP models count the same: their cosines
    are averaged. The models are copied, frozen and in eval mode.

    Args:
        clip: CLIP models, or folders or hub ids of them.
        concepts: what is erased.
        alternatives: per target what else a picture could show; a concept that is not named takes
            what it preserves, else its anchor, else ``a picture``. Alternatives should be of the
            same kind: the other digits for a digit, not its colours.
        max_similarity: above this cosine, a concept cannot be told from an alternative.

    Raises:
        RequestError: a text that is too long, or that the CLIP models cannot tell from an
            alternative; the message gives their similarity.
        ConfigurationError: no CLIP model, or alternatives of something that is not erased.

    Reference:
        Radford et al., Learning transferable visual models from natural language supervision,
        2021, arXiv 2103.00020; directions: Gal et al., StyleGAN-NADA, 2021, arXiv 2108.00946.
    """

    def __init__(
        self,
        clip: ClipModel | str | Path | Sequence[ClipModel | str | Path],
        concepts: Sequence[ConceptSpec],
        alternatives: Mapping[str, Sequence[str]] | None = None,
        max_similarity: float = MAX_SIMILARITY,
    ) -> None:
        given = [clip] if isinstance(clip, ClipModel | str | Path) else list(clip)
        if not given:
            raise ConfigurationError("`guide` is empty; give at least one CLIP model")
        loaded = [load_clip(one) if isinstance(one, str | Path) else one for one in given]
        self.clips = [copy.deepcopy(one).eval().requires_grad_(False) for one in loaded]
        self.concepts = tuple(concepts)
        self.scale = sum(one.network.logit_scale.exp().item() for one in self.clips) / len(loaded)
        targets = [concept.target for concept in self.concepts]
        for name in alternatives or {}:
            if name not in targets:
                raise ConfigurationError(f"`alternatives` has '{name}', {suggest(name, targets)}")
        self.alternatives = {
            concept.target: tuple((alternatives or {}).get(concept.target, ()))
            or concept.preserve
            or (concept.anchor_text or NEUTRAL,)
            for concept in self.concepts
        }
        self.max_similarity = max_similarity
        self._warn()
        with torch.no_grad():
            self.targets = torch.stack([self._target(concept) for concept in self.concepts])
            self.others = [self._others(concept) for concept in self.concepts]
            anchors = [concept.anchor_text or NEUTRAL for concept in self.concepts]
            self.anchors = torch.stack(
                [self.texts([a], c)[0] for a, c in zip(anchors, self.concepts, strict=True)]
            )

    def _warn(self) -> None:
        for target, others in self.alternatives.items():
            for other in others:
                if set(other.lower().split()) & set(NEGATIONS):
                    logger.warning(
                        "the alternative '%s' of '%s' negates, which CLIP models hardly read; "
                        "name the opposite instead", other, target,
                    )  # fmt: skip

    def texts(self, words: Sequence[str], concept: ConceptSpec) -> Tensor:
        """Embed words in the sentences of a concept, (n, d); averaged over them.

        The sentences are the concept's own templates, else those the first CLIP model was trained
        with, else those of the concept's kind.
        """
        trained = self.clips[0].templates
        sentences = concept.templates or (trained if trained != ("{}",) else concept.sentences)
        return self._joined([one.class_embeddings(words, sentences) for one in self.clips])

    def _target(self, concept: ConceptSpec) -> Tensor:
        return F.normalize(self.texts(concept.words, concept).mean(dim=0), dim=0)

    def _others(self, concept: ConceptSpec) -> Tensor:
        names = self.alternatives[concept.target]
        found = self.texts(names, concept)
        target = self._target(concept)
        for name, similarity in zip(names, (found @ target).tolist(), strict=True):
            if similarity > self.max_similarity:
                raise RequestError(
                    f"the CLIP model cannot tell '{concept.target}' from '{name}': their texts "
                    f"have the similarity {similarity:.3f}, above {self.max_similarity:g}; choose "
                    "another anchor or other alternatives, other words, or another CLIP model"
                )
        return found

    @staticmethod
    def _joined(parts: Sequence[Tensor]) -> Tensor:
        """Side by side, so that a product is the mean of the products."""
        return torch.cat(list(parts), dim=-1) / len(parts) ** 0.5

    # ---- pictures -------------------------------------------------------------------------------

    def to(self, device: Any) -> ConceptGuide:
        """Move everything to a device."""
        self.clips = [one.to(device) for one in self.clips]
        self.targets, self.anchors = self.targets.to(device), self.anchors.to(device)
        self.others = [one.to(device) for one in self.others]
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) pictures in [0, 1] as (B, d) vectors of length 1, differentiable.

        Pictures that are not square are padded by their own edge, so that nothing is cut off.
        """
        height, width = images.shape[-2:]
        if height != width:
            more = abs(height - width)
            sides = (more // 2, more - more // 2)
            padding = (*sides, 0, 0) if width < height else (0, 0, *sides)
            images = F.pad(images, padding, mode="replicate")
        return self._joined([one.encode_images(images) for one in self.clips])

    def margins(self, embedding: Tensor) -> Tensor:
        """Margins (B, K) of K concepts, in logits, of embedded pictures (B, d)."""
        found = []
        for target, others in zip(self.targets, self.others, strict=True):
            others_of = torch.logsumexp(self.scale * embedding @ others.T, dim=1)
            found.append(self.scale * embedding @ target - others_of)
        return torch.stack(found, dim=1)

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (B, K) of K concepts in pictures (B, 3, H, W) in [0, 1]."""
        return self.margins(self.embed(images)).sigmoid()

    def directions(self) -> Tensor:
        """Unit directions (K, d) from each concept to its anchor, averaged over sentences."""
        return F.normalize(self.anchors - self.targets, dim=1)

    def describe(self) -> dict[str, Any]:
        """What the guide was, as plain data."""
        return {
            "hashes": [state_hash(one.network) for one in self.clips],
            "scale": self.scale,
            "alternatives": {name: list(others) for name, others in self.alternatives.items()},
        }
