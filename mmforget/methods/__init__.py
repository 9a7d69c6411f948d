"""Forgetting methods, one file each."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.methods.adapt_then_unlearn": ("AdaptThenUnlearn",),
    "mmforget.methods.adversarial_fine_tuning": ("AdversarialFineTuning",),
    "mmforget.methods.anchor_distillation": ("AnchorDistillation",),
    "mmforget.methods.base": ("ForgettingMethod", "GradientMethod", "StatisticsMethod"),
    "mmforget.methods.class_distillation": ("ClassDistillation",),
    "mmforget.methods.class_rerouting": ("ClassRerouting",),
    "mmforget.methods.clip_direction": ("ClipDirection",),
    "mmforget.methods.clip_repulsion": ("ClipRepulsion",),
    "mmforget.methods.concept_ablation": ("ConceptAblation",),
    "mmforget.methods.concept_salun": ("ConceptSalUn",),
    "mmforget.methods.esd": ("ESD",),
    "mmforget.methods.generator_editing": ("GeneratorMethod",),
    "mmforget.methods.gs_lora": ("GSLoRA",),
    "mmforget.methods.gs_lora_plus_plus": ("GSLoRAPlusPlus",),
    "mmforget.methods.head_only": ("HeadOnly",),
    "mmforget.methods.identity": ("Identity",),
    "mmforget.methods.identity_unlearning": ("IdentityUnlearning",),
    "mmforget.methods.latent_negation": ("LatentNegation",),
    "mmforget.methods.logit_mask": ("LogitMask",),
    "mmforget.methods.memory_fine_tuning": ("MemoryFineTuning",),
    "mmforget.methods.neg_grad_plus": ("NegGradPlus",),
    "mmforget.methods.nemo": ("NeMo",),
    "mmforget.methods.neuron_ratio_pruning": ("NeuronRatioPruning",),
    "mmforget.methods.parameter_extrapolation": ("ParameterExtrapolation",),
    "mmforget.methods.perp": ("PERP",),
    "mmforget.methods.pruning": ("PruningMethod",),
    "mmforget.methods.pruning_controls": (
        "BaseOnlyPruning",
        "MagnitudePruning",
        "RandomPruning",
    ),
    "mmforget.methods.random_labels": ("RandomLabels",),
    "mmforget.methods.rece": ("RECE",),
    "mmforget.methods.retain_fine_tuning": ("RetainFineTuning",),
    "mmforget.methods.retrain": ("Retrain",),
    "mmforget.methods.salun": ("SalUn",),
    "mmforget.methods.scrub": ("SCRUB",),
    "mmforget.methods.siss": ("SISS",),
    "mmforget.methods.sld": ("SLD",),
    "mmforget.methods.ssd": ("SSD",),
    "mmforget.methods.subspace_pruning": ("SubspacePruning",),
    "mmforget.methods.surrogates": ("make_surrogates", "ordinary_surrogates"),
    "mmforget.methods.text_guided": ("ConceptMethod", "DenoisingMethod"),
    "mmforget.methods.text_to_unlearn": ("TextToUnlearn",),
    "mmforget.methods.uce": ("UCE",),
    "mmforget.methods.unit_ablation": ("UnitAblation",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
