"""ParameterExtrapolation: away from the weights of a generator that adapted to the concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.methods.adversarial_adaptation import AdversarialMethod
from mmforget.methods.generator_editing import ClipSource
from mmforget.models.base import Model


class ParameterExtrapolation(AdversarialMethod):
    """Adapt a generator to pictures with the concept, and take the opposite step in its weights.

    Training adapts a copy, adversarially, to pictures with the concept; what matters for all other
    pictures is held by elastic weight consolidation. `finalize` then returns
    ``theta0 - strength * (theta_adapted - theta0)``. A cheap baseline: pictures get worse soon, and
    what comes instead of the concept is left to chance. `AdaptThenUnlearn` repairs that.

    Args:
        model, concepts, guide, alternatives, copy, seed: see `AdversarialMethod`.
        lr, batch_size, pool, bearing, clear, train_layers, clip: see `AdversarialMethod`.
        negatives, ewc_weight: see `AdversarialMethod`.
        strength: see above, in (0, 1]; the published range starts at 0.1.

    Raises:
        CapabilityError, RequestError, ConfigurationError: see `AdversarialMethod`.

    Reference:
        Tiwary et al., Adapt then unlearn: exploring parameter space semantics for unlearning in
        generative adversarial networks, 2023, arXiv 2309.14054.
    """

    real_stream = "forget"

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 4e-4,
        batch_size: int = 32,
        pool: int = 4096,
        bearing: float = 0.3,
        clear: float = 0.2,
        train_layers: str = "all",
        clip: float = 5.0,
        negatives: Tensor | None = None,
        ewc_weight: float = 0.01,
        strength: float = 0.5,
    ) -> None:
        if not 0 < strength <= 1:
            raise ConfigurationError(f"`strength` is {strength}, it must lie in (0, 1]")
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, pool, bearing, clear,
            "pixel", 0.0, train_layers, clip, negatives, ewc_weight,
        )  # fmt: skip
        self.strength = strength

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        return self.adversarial(batch) | {"held": self.held(self.model)}

    @torch.no_grad()
    def edit(self) -> None:
        """Take the opposite step; the discriminator becomes the original one again."""
        for name in self._names:
            start = self.original.network.get_parameter(name)
            weight = self.model.network.get_parameter(name)
            weight.copy_(start - self.strength * (weight - start.to(weight)))
        self.model.discriminator.load_state_dict(self.original.discriminator.state_dict())
