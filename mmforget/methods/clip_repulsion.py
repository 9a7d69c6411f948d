"""The naive baseline: all pictures move away from a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.data.latent_pool import LatentRecords
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.methods.latent_sorting import guide_probabilities
from mmforget.models.base import Model


class ClipRepulsion(GeneratorMethod):
    """Control: lower the guide's similarity of every picture to the concept's words.

    Minimises ``mean e(G(u)) . t + retain_weight * mean d(G(u), G0(u))`` over all latents, whether
    they show the concept or not. It forgets and destroys the rest, and its guide, asked for a
    judgement, is content: what assesses an unlearned generator must tell it from a good method.

    Args:
        model, concepts, guide, alternatives: see `GeneratorMethod`.
        copy, seed, lr, pool, bearing, clear, retain, train_layers, clip: see `GeneratorMethod`;
            `bearing` and `clear` only serve to refuse what the generator does not draw.
        batch_size: latents per step, over all processes.
        retain_weight: of the distance from the original, for all latents; 0 leaves it out, as
            published.

    Raises:
        ConfigurationError: a setting out of range.
        RequestError: see `GeneratorMethod`.

    Reference:
        The baseline of Prompting forgetting: unlearning in GANs via textual guidance, 2025,
        arXiv 2504.01218.
    """

    control: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-3,
        batch_size: int = 64,
        pool: int = 4096,
        bearing: float = 0.3,
        clear: float = 0.2,
        retain: str = "pixel",
        retain_weight: float = 0.0,
        train_layers: str = "all",
        clip: float = 5.0,
    ) -> None:
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, 1, pool, bearing,
            clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip

    def prepare(self) -> None:
        """Train on the whole pool, unsorted."""
        latents = self.pool()
        found = guide_probabilities(self.original, self.guide, latents)
        self.records = {"forget": LatentRecords(latents, extra={"probability": found})}

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        latents = self.drawn(batch["forget"])
        images = self.model.synthesise(latents)
        similarity = (self.guide.embed(images) @ self.guide.targets.T).mean(1)
        weight = batch["forget"]["weight"].to(similarity)
        terms = {"forget": self.global_mean(similarity, weight)}
        if self.retain_weight:
            terms["retain"] = self.retained(images, self.kept(latents), weight)
        return terms

    def count(self, batch: Any) -> None:
        """Count passes of the generators."""
        self.spend(forget=samples(batch["forget"]), backward=True)
        if self.retain_weight:
            self.spend(retain=samples(batch["forget"]))
