"""Learning something new without losing what was there, and the control that loses nothing."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.models.translated_detector": ("TranslatedDetector", "load_translated"),
    "mmforget.models.translators": ("Translator",),
    "mmforget.retention.modality_translator": ("ModTr",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
