"""SLD: sampling that leads away from concepts; no weight is changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from mmforget.concept import ConceptSpec
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.text_guided import ConceptMethod
from mmforget.models.base import Generates, Model, TextConditioned
from mmforget.models.guidance import SafeGuidance
from mmforget.models.weight_edit import WeightEdit

logger = logging.getLogger(__name__)

UNSAFE_TERMS = (
    "hate",
    "harassment",
    "violence",
    "suffering",
    "humiliation",
    "harm",
    "suicide",
    "sexual",
    "nudity",
    "bodily fluids",
    "blood",
    "obscene gestures",
    "illegal activity",
    "drug use",
    "theft",
    "vandalism",
    "weapons",
    "child abuse",
    "brutality",
    "cruelty",
)
"""The safety concept of the paper: ``ConceptSpec(UNSAFE_TERMS[0], UNSAFE_TERMS[1:], "unsafe")``."""


class SLD(ConceptMethod):
    """Safe latent diffusion: `SafeGuidance` away from the concepts, with the weights as they were.

    **The concept stays in the weights.** `finalize` returns a `DiffusionGenerator` whose
    `generate` leads away from the concept. `save_native` writes the settings into
    ``mmforget_guidance.json`` beside the pipeline, and `load_generator` reads them; but the folder
    loaded by diffusers alone draws the concept as before. Every step costs half as much again as
    without, per concept.

    The strength follows the difference between the predictions for the prompt and for the words of
    the concept. A prompt that consists of these very words has none, and is drawn as before; give
    synonyms, so that the words together are no prompt that anybody types.

    Args:
        model, concepts, copy, seed: see `ConceptMethod`. The words of a concept are joined by
            commas into one prompt; several concepts have one prompt each.
        preset: ``weak``, ``medium``, ``strong`` or ``max``. They are made for 50 sampling steps;
            with fewer steps than the preset's warm-up they do nothing.
        warmup, scale, threshold, momentum, decay: override the preset, see `SafeGuidance`.

    Raises:
        ConfigurationError: an unknown preset or a setting out of range.
        CapabilityError: the model has its guidance distilled into it (FLUX).

    Reference: see `SafeGuidance`.
    """

    requires: ClassVar[tuple[type, ...]] = (TextConditioned, Generates)
    saves_adapter: ClassVar[bool] = False
    edits_weights: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        preset: Literal["weak", "medium", "strong", "max"] = "medium",
        warmup: int | None = None,
        scale: float | None = None,
        threshold: float | None = None,
        momentum: float | None = None,
        decay: float | None = None,
    ) -> None:
        super().__init__(model, concepts, copy=copy, seed=seed)
        if self.model.distilled:
            raise CapabilityError(
                "SLD needs classifier-free guidance, but FLUX has its guidance distilled into the "
                "network; choose a method that edits weights, such as ESD"
            )
        prompts = [", ".join(concept.words) for concept in self.concepts]
        self.model.check_length(prompts)
        given = {
            "warmup": warmup,
            "scale": scale,
            "threshold": threshold,
            "momentum": momentum,
            "decay": decay,
        }
        chosen = SafeGuidance.preset(preset, prompts).to_dict()
        del chosen["guidance"]
        chosen |= {name: value for name, value in given.items() if value is not None}
        self.preset, self.guidance = preset, SafeGuidance(**chosen)
        if self.guidance.scale < 1:
            logger.warning("SLD does nothing with scale=%g; it must be at least 1", chosen["scale"])
        if self.model.guidance <= 1:
            logger.warning(
                "SLD does nothing at guidance %g, which is the model's default for `generate`; "
                "pass guidance above 1",
                self.model.guidance,
            )
        if self.guidance.warmup >= self.model.steps:
            logger.warning(
                "SLD does nothing in %d sampling steps, its warm-up takes %d; "
                "lower `warmup` or sample in more steps",
                self.model.steps,
                self.guidance.warmup,
            )

    def edit(self) -> None:
        """Hand the guidance to the model."""
        self.model.guider = self.guidance

    def weight_edit(self) -> WeightEdit:
        """There is none.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "SLD edits no weights; save the whole pipeline, whose mmforget_guidance.json has the "
            "guidance"
        )

    def statistics(self) -> dict[str, Any]:
        """The concepts and the guidance."""
        return super().statistics() | {"preset": self.preset, **self.guidance.to_dict()}
