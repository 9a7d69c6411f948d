"""Labelled images, and the roles that they play in a request."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.data.access": ("DataAccess",),
    "mmforget.data.base": ("ForgetDataModule", "ImageDataset"),
    "mmforget.data.cifar": ("CIFAR10", "CIFAR100"),
    "mmforget.data.coco": ("CocoFolder",),
    "mmforget.data.detection": ("DetectionDataModule", "DetectionDataset"),
    "mmforget.data.digit_questions": ("DigitQuestions",),
    "mmforget.data.digit_scenes": ("DigitScenes",),
    "mmforget.data.digit_world": ("DigitWorld",),
    "mmforget.data.huggingface": ("HuggingFaceData",),
    "mmforget.data.huggingface_detection": ("HuggingFaceDetection",),
    "mmforget.data.huggingface_questions": ("HuggingFaceQuestions",),
    "mmforget.data.image_folder": ("ImageFolderData",),
    "mmforget.data.memorized": ("Captioned", "Coverage", "MemorizedPrompt", "MemorizedSet"),
    "mmforget.data.memorized_files": ("load_captioned", "load_memorized", "save_memorized"),
    "mmforget.data.planted": ("planted_memories",),
    "mmforget.data.question_files": ("QuestionFolder",),
    "mmforget.data.question_records": ("QuestionDataset",),
    "mmforget.data.questions": ("QuestionDataModule",),
    "mmforget.data.split": ("ForgetSplit",),
    "mmforget.data.torchvision_data": ("TorchvisionData",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
