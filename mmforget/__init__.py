"""mmforget: make vision and generative models forget, and prove that they did.

Names are imported on first use, so that ``import mmforget`` loads neither torch nor Lightning.
"""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

__version__ = "0.1.0"

_EXPORTS = {
    "mmforget.request": ("ForgetRequest",),
    "mmforget.errors": ("MMForgetError",),
    "mmforget.models": ("ImageClassifier", "load_classifier"),
    "mmforget.data": (
        "CIFAR10",
        "CIFAR100",
        "DigitWorld",
        "ForgetDataModule",
        "HuggingFaceData",
        "ImageFolderData",
        "TorchvisionData",
    ),
    "mmforget.methods": (
        "GSLoRA",
        "GSLoRAPlusPlus",
        "HeadOnly",
        "Identity",
        "LogitMask",
        "NegGradPlus",
        "RandomLabels",
        "Retrain",
        "SCRUB",
        "SSD",
        "SalUn",
    ),
    "mmforget.sequence": ("SequenceRunner",),
    "mmforget.audit": ("AuditSettings", "AuditedModel", "audit"),
    "mmforget.report": ("write_report",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
