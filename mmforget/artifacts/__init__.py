"""What a run leaves on the disk: run folder, weights, adapters, manifest, card, ledger."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.artifacts.adapters": ("apply_adapter", "withdraw_adapter"),
    "mmforget.artifacts.ledger": ("Ledger",),
    "mmforget.artifacts.manifest": ("Manifest",),
    "mmforget.artifacts.run_folder": ("RunFolder",),
    "mmforget.artifacts.save": ("save_artifact",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
