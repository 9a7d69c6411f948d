"""Drawing a memorized prompt without its memory: the prompt is changed, the weights are not.

None of this makes a model forget: whoever has the weights can leave it out. It is what removal from
the weights has to compare with.
"""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.mitigation.attention_reweighting": ("AttentionReweighting",),
    "mmforget.mitigation.base": ("PromptMitigation", "mitigated_pictures"),
    "mmforget.mitigation.embedding_optimisation": ("EmbeddingOptimisation",),
    "mmforget.mitigation.rejection_filter": ("RejectionFilter",),
    "mmforget.mitigation.token_randomisation": ("EmbeddingNoise", "TokenRandomisation"),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
