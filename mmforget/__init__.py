"""mmforget: make vision and generative models forget, and prove that they did.

Names are imported on first use, so that ``import mmforget`` loads neither torch nor Lightning.
"""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

__version__ = "0.1.0"

_EXPORTS = {
    "mmforget.request": ("ForgetRequest",),
    "mmforget.concept": ("ConceptSpec",),
    "mmforget.erase": ("erase",),
    "mmforget.errors": ("MMForgetError",),
    "mmforget.models": (
        "Detector",
        "DiffusionGenerator",
        "ImageClassifier",
        "ImageGAN",
        "load_classifier",
        "load_detector",
        "load_gan",
        "load_generator",
    ),
    "mmforget.models.clip": ("ClipModel", "load_clip"),
    "mmforget.models.weight_edit": ("WeightEdit",),
    "mmforget.metrics.judge": ("load_judge",),
    "mmforget.data": (
        "CIFAR10",
        "CIFAR100",
        "CocoFolder",
        "DetectionDataModule",
        "DigitScenes",
        "DigitWorld",
        "ForgetDataModule",
        "HuggingFaceData",
        "HuggingFaceDetection",
        "ImageFolderData",
        "TorchvisionData",
    ),
    "mmforget.methods": (
        "AdaptThenUnlearn",
        "AnchorDistillation",
        "ClassDistillation",
        "ClassRerouting",
        "ClipDirection",
        "ClipRepulsion",
        "ConceptAblation",
        "ConceptSalUn",
        "ESD",
        "GSLoRA",
        "GSLoRAPlusPlus",
        "HeadOnly",
        "Identity",
        "IdentityUnlearning",
        "LatentNegation",
        "LogitMask",
        "NegGradPlus",
        "ParameterExtrapolation",
        "RECE",
        "RandomLabels",
        "Retrain",
        "SCRUB",
        "SLD",
        "SSD",
        "SalUn",
        "TextToUnlearn",
        "UCE",
        "UnitAblation",
    ),
    "mmforget.retention": ("ModTr", "TranslatedDetector", "load_translated"),
    "mmforget.sequence": ("SequenceRunner",),
    "mmforget.audit.detectors": ("DetectorAuditSettings", "audit_detector"),
    "mmforget.audit.concepts": ("ConceptAuditSettings", "audit_generator"),
    "mmforget.audit.generators": ("GANAuditSettings", "audit_gan"),
    "mmforget.audit.memorization": ("MemorizationAuditSettings", "audit_memorization"),
    "mmforget.audit": ("AuditSettings", "AuditedModel", "audit"),
    "mmforget.report": ("write_report",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
