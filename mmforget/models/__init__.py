"""Model families, one file each."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.models.base": ("Model", "Site", "state_hash"),
    "mmforget.models.classifier": ("ImageClassifier", "load_classifier"),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
