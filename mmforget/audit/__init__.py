"""The measurement of one or more models against a request."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.audit.protocol": ("audit",),
    "mmforget.audit.results": ("MetricResult", "ModelEntry", "Results"),
    "mmforget.audit.scene": ("AuditSettings", "AuditedModel"),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
