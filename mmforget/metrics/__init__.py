"""Metrics: functions of arrays, and `torchmetrics.Metric` classes on top of them."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.metrics.clip": ("CLIPScore", "ConceptProbability"),
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
    "mmforget.metrics.perceptual": ("LayerDistance", "PairedChange", "PerceptualDistance"),
    "mmforget.metrics.token_cost": (
        "DecoderShape",
        "GenerationLatency",
        "Latency",
        "generation_latency",
        "measured_latency",
    ),
    "mmforget.metrics.vacuous": ("VacuousCheck",),
    "mmforget.metrics.visual_attention": ("VisualAttention", "visual_mass"),
    "mmforget.metrics.visual_evidence": ("visual_evidence",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
