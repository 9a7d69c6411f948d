"""Learning something new without losing what was there, and the control that loses nothing."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.models.translated_detector": ("TranslatedDetector", "load_translated"),
    "mmforget.models.translators": ("Translator",),
    "mmforget.retention.a2sf": ("A2SF",),
    "mmforget.retention.eviction_policy": ("EvictionPolicy", "RandomKeys", "RecentKeys"),
    "mmforget.retention.heavy_hitters": ("H2O",),
    "mmforget.retention.kv_eviction": ("KVEviction",),
    "mmforget.retention.fast_v": ("AttentionScores", "FastV"),
    "mmforget.retention.lines": (
        "LiNeS",
        "Ramp",
        "best_scaling",
        "merge_tasks",
        "scaling_curve",
    ),
    "mmforget.retention.modality_translator": ("ModTr",),
    "mmforget.retention.protected_entries": ("ProtectedEntries", "lora_changes"),
    "mmforget.retention.reg_lora": ("RegLoRA", "RegLoRACallback"),
    "mmforget.retention.remembering_model": ("RememberingLM", "load_remembering"),
    "mmforget.retention.take_along": (
        "Reaffirmation",
        "TakeAlongLM",
        "dynamic_visual_reaffirmation",
    ),
    "mmforget.retention.token_baselines": ("GridScores", "RandomScores"),
    "mmforget.retention.token_budget": ("TokenBudget",),
    "mmforget.retention.token_pooling": ("PooledTokens",),
    "mmforget.retention.token_pruning": ("TokenPruner",),
    "mmforget.retention.token_reduction": (
        "TOKEN_REDUCERS",
        "KeptTokens",
        "PictureTokens",
        "TokenReducer",
        "token_reducer",
    ),
    "mmforget.retention.vision_remember": ("VisionRemember",),
    "mmforget.retention.vision_zip": ("VisionZip",),
    "mmforget.retention.visual_calibration": ("PeriodicVisualCalibration",),
    "mmforget.retention.visual_heads": ("Head", "head_effects", "pruned_heads", "random_heads"),
    "mmforget.retention.visual_features": ("ChosenTokens",),
    "mmforget.retention.snap_kv": ("SnapKV",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
