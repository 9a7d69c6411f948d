"""A judge from a CLIP model, for concepts that no classifier knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmforget.concept import ConceptSpec, normalised
from mmforget.metrics.judge import Judge

SOMETHING_ELSE = "something else"


def zero_shot(clip: Any, concepts: Sequence[ConceptSpec]) -> Judge:
    """Choose among the erased concepts, the preserved ones, the anchors, and something else.

    Args:
        clip: a `ClipModel`; not the one whose text encoder steers the generator, since an edit
            that only fools that encoder would fool such a judge too.
        concepts: what was erased.
    """
    from mmforget.metrics.judge import ClipJudge

    named = [concept.target for concept in concepts]
    named += [kept for concept in concepts for kept in concept.preserve]
    named += [concept.anchor_text for concept in concepts if concept.anchor_text]
    values = list({normalised(name): name for name in [*named, SOMETHING_ELSE]}.values())
    sentences = list(dict.fromkeys(s for concept in concepts for s in concept.sentences))
    return ClipJudge(clip, {"concept": values}, {"concept": sentences})
