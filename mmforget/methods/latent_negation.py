"""Feature unlearning: draw from where the feature is missing along its latent direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from mmforget.concept import ConceptSpec
from mmforget.data.latent_pool import LatentRecords
from mmforget.errors import ConfigurationError, RequestError, suggest
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.models.base import Latents, LatentSpace, Model

Gate = Literal["guide", "projection"]
NegationSpace = Literal["z", "w"]


class LatentNegation(GeneratorMethod):
    """Let latents that show a feature draw what the original draws without it.

    The feature's direction v is the mean of the latents that show it minus that of those that do
    not, at length 1, and t is the mean projection of the latter. The target of a latent u is what
    the original draws from ``u' = u - max(u.v - t, 0) v``::

        mean_{u shows it} d(G(u), G0(u')) + retain_weight * mean_{others} d(G(u), G0(u))

    There is no gradient through the guide, so no texture that only fools it. It needs a feature
    that a plane separates in latent space: the direction is found on one half of the pool and
    tested on the other. Kinds of objects are rarely separable in the latent space of small
    generators, their colours mostly are.

    Args:
        model, concepts, guide, alternatives: see `GeneratorMethod`.
        copy, seed, lr, batch_size, retain_batch_size, pool, bearing, clear: see `GeneratorMethod`.
        retain, train_layers, clip: see `GeneratorMethod`; the distance serves both terms.
        retain_weight: see above.
        space: where the direction lies: ``z``, or ``w`` for style-based networks.
        gate: which latents shall change: ``guide`` takes those whose picture shows the feature to
            the guide, ``projection`` those with ``u.v > t``, as published; the latter also moves
            about half of the pictures that never showed it.
        separability: least area under the ROC curve of ``u.v``, in [0, 1].

    Raises:
        ConfigurationError: a setting out of range, or a space that the network does not have.
        RequestError: see `GeneratorMethod`; at the start of the training, a feature that no plane
            separates.

    Reference:
        Moon et al., Feature unlearning for pre-trained GANs and VAEs, 2024, arXiv 2303.05699.
    """

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-3,
        batch_size: int = 32,
        retain_batch_size: int = 32,
        pool: int = 4096,
        bearing: float = 0.3,
        clear: float = 0.2,
        retain: str = "pixel",
        retain_weight: float = 4.0,
        train_layers: str = "all",
        clip: float = 5.0,
        space: NegationSpace = "z",
        gate: Gate = "guide",
        separability: float = 0.8,
    ) -> None:
        if gate not in get_args(Gate):
            raise ConfigurationError(f"`gate` is '{gate}', {suggest(gate, get_args(Gate))}")
        if not 0 <= separability <= 1:
            raise ConfigurationError(
                f"`separability` is {separability}, it must lie in [0, 1]; 0 switches the test off"
            )
        spaces = [s for s in getattr(model, "latent_spaces", ("z",)) if s != "w+"]
        if space not in spaces:
            raise ConfigurationError(f"`space` is '{space}', {suggest(space, spaces)}")
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, retain_batch_size,
            pool, bearing, clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip
        self.space: LatentSpace = space
        self.gate: Gate = gate
        self.separability = separability
        self._directions, self._thresholds = torch.zeros(0), torch.zeros(0)
        self.found: dict[str, float] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Find the directions (K, d), and refuse what they do not separate."""
        forget, retain = self.records["forget"], self.records["retain"]
        clear = self._codes(retain.latents)
        codes = self._codes(forget.latents)
        shown = forget.extra["probability"] > self.bearing
        directions, thresholds = [], []
        for number, concept in enumerate(self.concepts):
            showing = codes[shown[:, number]]
            halves = [_direction(showing[first::2], clear[first::2]) for first in (0, 1)]
            tested = [
                float(
                    binary_auroc(
                        torch.cat([showing[first::2], clear[first::2]]) @ halves[1 - first],
                        torch.cat([torch.ones(len(showing[first::2])),
                                   torch.zeros(len(clear[first::2]))]).long(),
                    )
                )
                for first in (0, 1)
            ]  # fmt: skip
            area = sum(tested) / 2
            self.found[concept.target] = area
            if area < self.separability:
                raise RequestError(
                    f"no plane in the space '{self.space}' separates “{concept.target}” from the "
                    f"rest (area under the ROC curve {area:.2f}, at least {self.separability:g} is "
                    "needed); use another method, such as TextToUnlearn, or lower `separability`"
                )
            directions.append(_direction(showing, clear))
            thresholds.append((clear @ directions[-1]).mean())
        self._directions, self._thresholds = torch.stack(directions), torch.stack(thresholds)
        if self.gate == "projection":
            self._sort_by_projection()

    def _sort_by_projection(self) -> None:
        latents = self.pool()
        over = (self._codes(latents) @ self._directions.T > self._thresholds).any(1)
        self.records = {
            name: LatentRecords(latents[rows], rows.nonzero()[:, 0])
            for name, rows in (("forget", over), ("retain", ~over))
        }

    @torch.no_grad()
    def _codes(self, latents: Latents) -> Tensor:
        """Codes (n, d) in the space of the directions, on the CPU."""
        found: Tensor = self.original.mapped(latents, self.space).codes
        return found.float().cpu()

    @torch.no_grad()
    def negated(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the original draws (B, 3, H, W) once the features have been taken out."""
        latents = self.original.mapped(self.drawn(batch), self.space)
        directions = self._directions.to(latents.codes)
        over = latents.codes @ directions.T - self._thresholds.to(latents.codes)
        if self.gate == "guide":
            over = over * (batch["probability"].to(over) > self.bearing)
        return self.kept(latents.moved(latents.codes - torch.relu(over) @ directions))

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        bearing, clear = self.drawn(batch["forget"]), self.drawn(batch["retain"])
        images = self.model.synthesise(Latents.cat([bearing, clear]))
        n = len(bearing)
        change = self.distance(images[:n], self.negated(batch["forget"]))
        weight = {name: batch[name]["weight"].to(change) for name in ("forget", "retain")}
        return {
            "forget": self.global_mean(change, weight["forget"]),
            "retain": self.retained(images[n:], self.kept(clear), weight["retain"]),
        }

    def count(self, batch: Any) -> None:
        """Count passes of both generators."""
        forget, retain = samples(batch["forget"]), samples(batch["retain"])
        self.spend(forget, retain, backward=True)
        self.spend(forget, retain)

    def statistics(self) -> dict[str, Any]:
        """The base's, and how well a plane separates each feature."""
        return super().statistics() | {
            "separability": self.found, "space": self.space, "gate": self.gate
        }  # fmt: skip


def _direction(showing: Tensor, clear: Tensor) -> Tensor:
    """Unit direction (d,) from the mean of codes (m, d) to that of others (n, d)."""
    found = showing.mean(0) - clear.mean(0)
    return found / found.norm().clamp(min=torch.finfo(found.dtype).tiny)
