"""Forgetting methods, one file each."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.methods.base": ("ForgettingMethod", "GradientMethod", "StatisticsMethod"),
    "mmforget.methods.concept_ablation": ("ConceptAblation",),
    "mmforget.methods.concept_salun": ("ConceptSalUn",),
    "mmforget.methods.esd": ("ESD",),
    "mmforget.methods.gs_lora": ("GSLoRA",),
    "mmforget.methods.gs_lora_plus_plus": ("GSLoRAPlusPlus",),
    "mmforget.methods.head_only": ("HeadOnly",),
    "mmforget.methods.identity": ("Identity",),
    "mmforget.methods.logit_mask": ("LogitMask",),
    "mmforget.methods.neg_grad_plus": ("NegGradPlus",),
    "mmforget.methods.random_labels": ("RandomLabels",),
    "mmforget.methods.rece": ("RECE",),
    "mmforget.methods.retrain": ("Retrain",),
    "mmforget.methods.salun": ("SalUn",),
    "mmforget.methods.scrub": ("SCRUB",),
    "mmforget.methods.sld": ("SLD",),
    "mmforget.methods.ssd": ("SSD",),
    "mmforget.methods.text_guided": ("ConceptMethod", "DenoisingMethod"),
    "mmforget.methods.uce": ("UCE",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
