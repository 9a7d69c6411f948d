"""From results to a page: HTML, Markdown, pictures. Imports no torch."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {"mmforget.report.write": ("write_report",)}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
