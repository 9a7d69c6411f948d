"""AdaptThenUnlearn: adapt to the concept first, then train on, away from these weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.data.record_stream import RecordStream
from mmforget.errors import ConfigurationError, DivergenceError, suggest
from mmforget.methods.adversarial_adaptation import AdversarialMethod, hinge_terms
from mmforget.methods.base import detached_copy
from mmforget.methods.generator_editing import ClipSource
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Model
from mmforget.seeds import derive

Repulsion = Literal["exponential", "inverse", "negative"]
FARTHEST = 4.0
"""Distance from which on ``negative`` no longer pushes; without a bound it would never end."""


class AdaptThenUnlearn(AdversarialMethod):
    """Train on, against the discriminator, on pictures without the concept and away from it.

    Stage 1 adapts copies of the generator to pictures with the concept, each with other draws, as
    in `ParameterExtrapolation`. Stage 2 trains the original on pictures of its own without the
    concept, and pushes its weights from those of stage 1. With D the mean squared difference over
    all weights, divided by that at the start, the term is ``exp(-alpha * D)``, ``1 / D`` or ``-D``,
    the mean over the copies. Published are the plain distances; dividing makes `alpha` and the
    weight fit generators of any size.

    The guide takes the place of the user who tells good pictures from bad ones.

    Args:
        model, concepts, guide, alternatives, copy, seed: see `AdversarialMethod`. The result's
            discriminator is that of stage 2.
        lr, batch_size, pool, bearing, clear, retain: see `AdversarialMethod`.
        retain_weight: of the distance to what the original draws from clear latents, which is ours;
            0 is the published method, which needs 1000 steps and more to repair what the push
            breaks.
        train_layers, clip, negatives, ewc_weight: see `AdversarialMethod`.
        copies: adapted generators of stage 1.
        adapt_steps: of each.
        repulsion: ``exponential``, ``inverse`` or ``negative``, see above.
        repulsion_weight, alpha: see above.

    Raises:
        CapabilityError, RequestError, ConfigurationError: see `AdversarialMethod`.
        DivergenceError: stage 1 did not stay finite.

    Reference:
        Tiwary et al., Adapt then unlearn: exploring parameter space semantics for unlearning in
        generative adversarial networks, 2023, arXiv 2309.14054.
    """

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
        retain: str = "pixel",
        retain_weight: float = 10.0,
        train_layers: str = "all",
        clip: float = 5.0,
        negatives: Tensor | None = None,
        ewc_weight: float = 0.01,
        copies: int = 2,
        adapt_steps: int = 200,
        repulsion: Repulsion = "exponential",
        repulsion_weight: float = 1.0,
        alpha: float = 1.0,
    ) -> None:
        at_least_one(copies=copies, adapt_steps=adapt_steps)
        if repulsion not in get_args(Repulsion):
            raise ConfigurationError(
                f"`repulsion` is '{repulsion}', {suggest(repulsion, get_args(Repulsion))}"
            )
        if not repulsion_weight >= 0 or not alpha > 0:
            raise ConfigurationError(
                f"`repulsion_weight` is {repulsion_weight} and `alpha` {alpha}; they must be 0 or "
                "more, and positive"
            )
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, pool, bearing, clear,
            retain, retain_weight, train_layers, clip, negatives, ewc_weight,
        )  # fmt: skip
        self.copies, self.adapt_steps = copies, adapt_steps
        self.repulsion: Repulsion = repulsion
        self.repulsion_weight, self.alpha = repulsion_weight, alpha
        self._adapted: list[dict[str, Tensor]] = []
        self._start: list[Tensor] = []

    # ---- stage 1 --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Stage 1, on every process alike."""
        super().prepare()
        self._adapted = [self._adapt(number) for number in range(self.copies)]
        start = dict(self.original.network.named_parameters())
        self._start = [self._apart(start, one).detach() for one in self._adapted]

    @torch.enable_grad()
    def _adapt(self, number: int) -> dict[str, Tensor]:
        """The weights of a generator that has adapted to pictures with the concept."""
        model: Any = detached_copy(self.original).requires_grad_(False).eval()
        model.discriminator.requires_grad_(True).train()
        weights = [model.network.get_parameter(name).requires_grad_(True) for name in self._names]
        trained = [*weights, *model.discriminator.parameters()]
        optimizer = torch.optim.Adam(trained, self.lr, betas=(0.5, 0.99))
        sizes = {"fake": self.batch_size, "forget": self.batch_size}
        stream = RecordStream(self.records, sizes, derive(self.seed, "adaptation", number))
        device = weights[0].device
        for step in range(self.adapt_steps):
            fake, real = (
                {
                    key: value.to(device)
                    for key, value in self.records[name][
                        stream.positions(name, step).tolist()
                    ].items()
                }
                for name in sizes
            )
            parts = hinge_terms(model, self.drawn(fake), self.real(real), real.get("label"))
            loss = torch.stack([part.mean() for part in parts]).sum() + self.held(model)
            if not torch.isfinite(loss):
                raise DivergenceError(
                    f"AdaptThenUnlearn: the loss of stage 1 is not finite at step {step}; lower "
                    f"`lr` (now {self.lr:g})"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, self.clip)
            optimizer.step()
        passes = self.adapt_steps * self.batch_size
        self.spend(forget=passes)
        self.spend(retain=passes, backward=True)
        return {
            name: weight.detach().clone() for name, weight in zip(self._names, weights, strict=True)
        }

    # ---- stage 2 --------------------------------------------------------------------------------

    @staticmethod
    def _apart(weights: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> Tensor:
        """Mean squared difference over all numbers."""
        total = torch.stack([(weights[n] - value).square().sum() for n, value in adapted.items()])
        return total.sum() / sum(value.numel() for value in adapted.values())

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        terms = self.adversarial(batch)
        weights = dict(self.model.network.named_parameters())
        pushes = []
        for adapted, start in zip(self._adapted, self._start, strict=True):
            apart = self._apart(weights, adapted) / start.clamp(min=1e-30)
            if self.repulsion == "exponential":
                pushes.append((-self.alpha * apart).exp())
            elif self.repulsion == "inverse":
                pushes.append(1 / apart.clamp(min=1e-3))
            else:
                pushes.append(-apart.clamp(max=FARTHEST))
        terms["repulsion"] = self.repulsion_weight * torch.stack(pushes).mean()
        if self.retain_weight:
            clear = self.drawn(batch["retain"])
            weight = batch["retain"]["weight"].to(terms["generator"])
            terms["retain"] = self.retained(self.model.synthesise(clear), self.kept(clear), weight)
        return terms

    def statistics(self) -> dict[str, Any]:
        """The base's, and the distances between original and adapted weights."""
        return super().statistics() | {
            "repulsion": self.repulsion,
            "adapted_distances": [float(value) for value in self._start],
        }
