"""Metrics: functions of arrays, and `torchmetrics.Metric` classes on top of them."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.metrics.answer_judges": (
        "AnswerJudge",
        "ComplianceJudge",
        "KeywordJudge",
        "TargetJudge",
        "judged",
    ),
    "mmforget.metrics.answer_metrics": (
        "AttackSuccess",
        "ExactMatch",
        "OptionAccuracy",
        "RefusalRate",
        "Rouge",
        "SafeAnswerRefusal",
    ),
    "mmforget.metrics.answers": ("is_gibberish", "is_refusal", "rouge"),
    "mmforget.metrics.clip": ("CLIPScore", "ConceptProbability"),
    "mmforget.metrics.continual": ("ScoreMatrix", "forgetting_kinds", "style_scores"),
    "mmforget.metrics.copying": (
        "CopySimilarity",
        "DescriptorSimilarity",
        "NormalisedCorrelation",
        "PixelDistance",
        "ReplicationRate",
        "copy_thresholds",
        "load_similarity",
        "load_sscd",
        "memory_thresholds",
        "similarity_to_memories",
    ),
    "mmforget.metrics.coverage": ("DensityCoverage", "PairwiseDiversity", "PrecisionRecall"),
    "mmforget.metrics.detection": ("detection_scores",),
    "mmforget.metrics.distribution": ("FeatureNetwork", "FrechetDistance", "KernelDistance"),
    "mmforget.metrics.judge": ("ClassifierJudge", "ClipJudge", "ConceptRates", "load_judge"),
    "mmforget.metrics.modality": ("ModalityTable",),
    "mmforget.metrics.perceptual": ("LayerDistance", "PairedChange", "PerceptualDistance"),
    "mmforget.metrics.rates": ("Mean", "Scores"),
    "mmforget.metrics.token_cost": (
        "DecoderShape",
        "GenerationLatency",
        "Latency",
        "generation_latency",
        "measured_latency",
    ),
    "mmforget.metrics.truth_ratio": ("forget_quality", "model_utility", "truth_ratio"),
    "mmforget.metrics.vacuous": ("VacuousCheck",),
    "mmforget.metrics.visual_attention": ("VisualAttention", "visual_mass"),
    "mmforget.metrics.visual_evidence": ("visual_evidence",),
    "mmforget.metrics.visual_forgetting": ("ForgettingCurve", "VisualForgetting"),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
