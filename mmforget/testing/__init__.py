"""Checks that every method and every model passes; third-party packages can run them too."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.testing.conformance": ("MethodChecks", "check_method", "check_model"),
    "mmforget.testing.tiny_pipelines": ("tiny_pipeline",),
    "mmforget.testing.word_tokenizer": ("word_tokenizer",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
