"""Measurements that try to bring back what was forgotten."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.attacks.adversarial_prompt": ("adversarial_prompt_attack",),
    "mmforget.attacks.concept_inversion": ("inversion_attack",),
    "mmforget.attacks.embedding_inversion": ("EmbeddingAttackReport", "embedding_attack"),
    "mmforget.attacks.generator_report": (
        "AttackComparison",
        "GeneratorAttackReport",
        "compare_attack",
        "guide_logits",
        "guide_sees",
        "judge_logits",
    ),
    "mmforget.attacks.image_side": ("latent_inversion_attack", "sdedit_attack"),
    "mmforget.attacks.locality": ("LocalityReport", "memory_locality"),
    "mmforget.attacks.prompts": ("prompt_attack", "prompt_variants"),
    "mmforget.attacks.report": ("AttackReport", "sees"),
    "mmforget.attacks.soft_tokens": ("SoftTokens",),
    "mmforget.models.embedding_search": (
        "EmbeddingScale",
        "EmbeddingSearch",
        "embedding_scale",
        "search_embeddings",
    ),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
