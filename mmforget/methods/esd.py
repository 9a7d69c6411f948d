"""ESD: the denoiser learns to steer away from a concept, from its own predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.data.denoising import DenoisingRecords, spread, trajectory_records
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.base import OptimizerName
from mmforget.methods.denoiser_weights import WeightSet, parameters_of, select_weights
from mmforget.methods.text_guided import DenoisingMethod, at_least_one
from mmforget.models.base import Model
from mmforget.models.weight_edit import WeightEdit
from mmforget.seeds import derive

ADAPTER = "mmforget"


class ESD(DenoisingMethod):
    """Erased Stable Diffusion: regression on the frozen model's own guidance, turned round.

    For noisy pictures on the way to the concept, the student is given the concept's prompt and
    shall answer ``y = e(0) - eta * (e(c) - e(0))``, where e is the frozen model, c the prompt and
    0 the unconditional one. The released scripts write ``e(c) - k * (e(c) - e(0))``: k = eta + 1,
    so that their default k = 2 is eta = 1 here. Preserved concepts are held by the frozen model's
    conditional prediction on their own trajectories.

    Trajectories are sampled once, by the frozen model, and every step is kept together with `y`;
    training then needs one pass through the student and none through a teacher.

    For the kind ``attribute``, trajectories and student use the prompt `erase_from`, and
    ``y = e(c_f) - (eta + 1) * (e(c) - e(0))``. The anchor of a concept is not used.

    Args:
        model, concepts, copy: see `ConceptMethod`. Synonyms are erased too; all sentences of a
            concept are used. Several concepts have trajectories of their own.
        weights: see `mmforget.methods.denoiser_weights.select_weights`. ``x`` for named things and
            styles, ``x-strict`` for the least damage, ``u`` for what is everywhere, like nudity.
        eta: how far beyond the unconditional prediction, 0 or more; 0 maps the concept to it.
        lora_rank: train low-rank factors of the linear layers instead of the weights; they are
            merged by `finalize` and kept apart in `weight_edit`. A learning rate of 1e-4 and 500
            steps suit rank 4.
        trajectories: per concept of weight 1, over all its words and sentences.
        retain_trajectories: over all preserved texts; None takes as many as `trajectories`, and
            at least one per text.
        steps: sampling steps of a trajectory.
        guidance: scale of the guidance along the trajectories, above 1; ignored for FLUX, where 1
            is embedded in all passes.
        seed, lr, weight_decay, optimizer: see `DenoisingMethod`.
        batch_size, retain_batch_size, retain_weight, clip: see `DenoisingMethod`.

    Raises:
        ConfigurationError: a setting out of range.
        CapabilityError: the network has no layer in the set.

    Reference:
        R. Gandikota, J. Materzyńska, J. Fiotto-Kaufman, D. Bau: Erasing Concepts from Diffusion
        Models, ICCV 2023, arXiv 2303.07345.
    """

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        weights: WeightSet = "x",
        eta: float = 1.0,
        lora_rank: int | None = None,
        trajectories: int = 16,
        retain_trajectories: int | None = None,
        steps: int = 50,
        guidance: float = 3.0,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adam",
        batch_size: int = 4,
        retain_batch_size: int = 4,
        retain_weight: float = 1.0,
        clip: float = 1.0,
    ) -> None:
        if not eta >= 0:
            raise ConfigurationError(
                f"`eta` is {eta}, it must be 0 or more (eta = k - 1 for the k of released scripts)"
            )
        at_least_one(
            trajectories=trajectories,
            retain_trajectories=retain_trajectories,
            steps=steps,
            lora_rank=lora_rank,
        )
        if not guidance > 1:
            raise ConfigurationError(
                f"`guidance` is {guidance}, it must be above 1, or the trajectories do not lead "
                "to the concept"
            )
        self.weights, self.eta, self.lora_rank = weights, eta, lora_rank
        self.trajectories, self.retain_trajectories = trajectories, retain_trajectories
        self.steps, self.guidance = steps, guidance
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(
            model,
            concepts,
            copy=copy,
            seed=seed,
            lr=lr,
            weight_decay=weight_decay,
            optimizer=optimizer,
            batch_size=batch_size,
            retain_batch_size=retain_batch_size,
            retain_weight=retain_weight,
            clip=clip,
        )

    # ---- weights --------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """The chosen weights, or low-rank factors beside them."""
        sites = select_weights(self.model, self.weights)
        if self.lora_rank is None:
            return parameters_of(sites)
        self._layers = [site.name for site in sites if isinstance(site.module, nn.Linear)]
        if not self._layers:
            raise CapabilityError(
                f"weights='{self.weights}' has no linear layer for `lora_rank`; choose another set"
            )
        return self._attach(self.lora_rank)

    def _attach(self, rank: int) -> list[nn.Parameter]:
        from peft import LoraConfig

        network = self.model.network
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self._layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "lora"))
            network.add_adapter(config, adapter_name=ADAPTER)
        return [p for name, p in network.named_parameters() if f".{ADAPTER}." in name]

    @torch.no_grad()
    def edit(self) -> None:
        """Merge low-rank factors, if there are any, and take the adapter out."""
        if self.lora_rank is None:
            super().edit()
            return
        network = self.model.network
        for name in self._layers:
            layer = network.get_submodule(name)
            up, down = (
                getattr(layer, part)[ADAPTER].weight.detach().clone()
                for part in ("lora_B", "lora_A")
            )
            up *= layer.scaling[ADAPTER]
            weight = layer.base_layer.weight
            weight.copy_(weight + (up @ down).to(weight.dtype))
            self._factors[name] = (up, down)
        network.unload_lora()

    def weight_edit(self) -> WeightEdit:
        """Low-rank factors per layer, or the trained parameters, whole."""
        if self.lora_rank is None:
            return super().weight_edit()
        if not self._factors:
            raise ConfigurationError("ESD is not finished; call `finalize` before `weight_edit`")
        return WeightEdit(
            self.model.component, factors=dict(self._factors), metadata=self.metadata()
        )

    # ---- records --------------------------------------------------------------------------------

    def forget_records(self) -> DenoisingRecords:
        """Trajectories to the concepts, with predictions that lead away from them."""
        return DenoisingRecords.join([self._records_of(concept) for concept in self.concepts])

    def _records_of(self, concept: ConceptSpec) -> DenoisingRecords:
        words = [concept.prompts(word) for word in concept.words]
        counts = spread(words, max(1, round(self.trajectories * concept.weight)))
        prompts = [words[word][sentence] for word, sentence in counts]
        settings = (list(counts.values()), self.steps, self.guidance, self.seed)
        if concept.erase_from is None:
            return trajectory_records(self.model, prompts, self._away, *settings)
        kept = concept.prompts(concept.erase_from)
        return trajectory_records(
            self.model,
            # A text per pair, though some are equal: the pairs differ in what is taken away.
            [kept[sentence] for _, sentence in counts],
            self._without,
            *settings,
            further=prompts,
        )

    def _away(self, conditional: Tensor, plain: Tensor, _: int) -> Tensor:
        return plain - self.eta * (conditional - plain)

    def _without(self, kept: Tensor, plain: Tensor, _: int, conditional: Tensor) -> Tensor:
        return kept - (self.eta + 1) * (conditional - plain)

    def retain_records(self) -> DenoisingRecords | None:
        """Trajectories to the preserved concepts, with the predictions that steered them."""
        shares = self.shared_out(self.retain_trajectories, self.trajectories)
        if not shares:
            return None
        return trajectory_records(
            self.model,
            list(shares),
            lambda conditional, plain, _: conditional,
            list(shares.values()),
            self.steps,
            self.guidance,
            self.seed,
        )

    def statistics(self) -> dict[str, Any]:
        """The concepts and what was trained."""
        return super().statistics() | {
            "weights": self.weights,
            "eta": self.eta,
            "lora_rank": self.lora_rank,
        }
