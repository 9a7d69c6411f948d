"""Model families, one file each."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.models.base": (
        "Latents",
        "Model",
        "PromptEmbedding",
        "Segment",
        "Site",
        "TextLayer",
        "state_hash",
    ),
    "mmforget.models.classifier": ("ImageClassifier", "load_classifier"),
    "mmforget.models.detector": ("Detector", "load_detector"),
    "mmforget.models.diffusion": ("DiffusionGenerator", "load_generator"),
    "mmforget.models.gan": ("ImageGAN",),
    "mmforget.models.gan_files": ("load_gan",),
    "mmforget.models.multimodal": ("MultimodalLM", "load_multimodal"),
    "mmforget.models.text_layers": ("Family",),
}

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
