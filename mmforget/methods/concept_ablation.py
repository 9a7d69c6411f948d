"""Concept ablation: the denoiser learns to answer a concept as it answers an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.data.denoising import DenoisingRecords, made_pictures, noised_records, spread
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.base import OptimizerName
from mmforget.methods.denoiser_weights import (
    WeightSet,
    keys_and_values,
    parameters_of,
    select_weights,
)
from mmforget.methods.text_guided import DenoisingMethod, at_least_one
from mmforget.models.base import Model

AblationWeights = Literal["kv", "attention", "all"]
SETS: dict[str, WeightSet] = {"kv": "x-strict", "attention": "attention", "all": "all"}


class ConceptAblation(DenoisingMethod):
    """Match the prediction for the concept to that for its anchor, on pictures of the anchor.

    The frozen model makes pictures x of the anchor; with noise at uniform times they give x_t, and
    the student learns ``e_student(x_t, concept) = e(x_t, anchor)``. Both prompts are the same
    sentence. The teacher is the frozen model, where the released code asks the student itself,
    without gradient; at the first step they agree. For the empty anchor the pictures and the
    teacher are unconditional: it works, but a named anchor ("a cat" for "Grumpy Cat") keeps the
    pictures sensible.

    Args:
        model, concepts, copy: see `ConceptMethod`. Synonyms are ablated too; all sentences of a
            concept are used.
        weights: ``kv`` are the keys and values of the cross-attention, for objects and styles;
            ``attention`` is every attention layer, for nudity; ``all`` is every layer, for
            memorised pictures.
        variant: ``model`` as above; ``noise`` learns the noise that was mixed in instead, so that
            the concept's prompt comes to describe the anchor's pictures.
        prior: also go on learning the anchor's pictures under the anchor's prompt, among the
            retain records. The released settings double the learning rate with it.
        freeze_bos: let no gradient pass through keys and values of the begin token, which is the
            same for all prompts.
        pictures: of the anchor, per concept of weight 1, over all its words and sentences.
        retain_pictures: of the preserved texts; None takes as many as `pictures`, and at least one
            per text. The frozen model's prediction is kept on them.
        times: noise levels per picture.
        steps, guidance: for making the pictures.
        seed, lr, weight_decay, optimizer: see `DenoisingMethod`. 1.6e-5 is the effective rate of
            the released settings, for 100 to 200 steps.
        batch_size, retain_batch_size, retain_weight, clip: see `DenoisingMethod`.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        N. Kumari, B. Zhang, S.-Y. Wang, E. Shechtman, R. Zhang, J.-Y. Zhu: Ablating Concepts in
        Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516.
    """

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        weights: AblationWeights = "kv",
        variant: Literal["model", "noise"] = "model",
        prior: bool = False,
        freeze_bos: bool = True,
        pictures: int = 64,
        retain_pictures: int | None = None,
        times: int = 8,
        steps: int = 25,
        guidance: float = 6.0,
        lr: float = 1.6e-5,
        weight_decay: float = 1e-2,
        optimizer: OptimizerName = "adamw",
        batch_size: int = 4,
        retain_batch_size: int = 4,
        retain_weight: float = 1.0,
        clip: float = 1.0,
    ) -> None:
        if weights not in SETS:
            raise ConfigurationError(f"`weights` is '{weights}', {suggest(weights, SETS)}")
        if variant not in ("model", "noise"):
            raise ConfigurationError(
                f"`variant` is '{variant}', {suggest(variant, ('model', 'noise'))}"
            )
        at_least_one(
            pictures=pictures,
            retain_pictures=retain_pictures,
            times=times,
            steps=steps,
        )
        self.weights, self.variant, self.prior, self.freeze_bos = (
            weights,
            variant,
            prior,
            freeze_bos,
        )
        self.pictures, self.retain_pictures, self.times = pictures, retain_pictures, times
        self.steps, self.guidance = steps, guidance
        self._prior: list[DenoisingRecords] = []
        self._hooks: list[Any] = []
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

    def trained(self) -> list[nn.Parameter]:
        """The chosen weights; keys and values of the begin token are cut off from the gradient."""
        begins = [
            place
            for part in self.model.segments([""])
            for place in range(part.start, part.start + part.begin)
        ]
        if self.freeze_bos and begins:

            def detach(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                held = torch.zeros(output.shape[1], dtype=torch.bool, device=output.device)
                held[begins] = True
                return torch.where(held[:, None], output.detach(), output)

            self._hooks = [
                site.module.register_forward_hook(detach) for site in keys_and_values(self.model)
            ]
        return parameters_of(select_weights(self.model, SETS[self.weights]))

    def edit(self) -> None:
        """Take the hooks away."""
        super().edit()
        for hook in self._hooks:
            hook.remove()

    def forget_records(self) -> DenoisingRecords:
        """Noisy pictures of the anchors, as answers to the concepts' prompts."""
        return DenoisingRecords.join([self._records_of(concept) for concept in self.concepts])

    def _records_of(self, concept: ConceptSpec) -> DenoisingRecords:
        words = [concept.prompts(word) for word in concept.words]
        anchors = concept.prompts(concept.anchor_text)
        counts = spread(words, max(1, round(self.pictures * concept.weight)))
        students = [words[word][sentence] for word, sentence in counts]
        teachers = [anchors[sentence] for _, sentence in counts]
        made = made_pictures(
            self.model, teachers, list(counts.values()), self.steps, self.guidance, self.seed
        )
        if self.prior:
            self._prior.append(noised_records(self.model, made, self.times, self.seed))
        records = noised_records(
            self.model,
            made,
            self.times,
            self.seed,
            teacher=teachers if self.variant == "model" else None,
            student=students,
        )
        records.passes += made.passes
        return records

    def retain_records(self) -> DenoisingRecords | None:
        """Noisy pictures of what is preserved, and of the anchors with the prior term."""
        parts, self._prior = self._prior, []
        shares = self.shared_out(self.retain_pictures, self.pictures)
        if shares:
            prompts = list(shares)
            made = made_pictures(
                self.model, prompts, list(shares.values()), self.steps, self.guidance, self.seed
            )
            records = noised_records(self.model, made, self.times, self.seed, teacher=prompts)
            records.passes += made.passes
            parts.append(records)
        return DenoisingRecords.join(parts) if parts else None

    def statistics(self) -> dict[str, Any]:
        """The concepts and what was trained."""
        return super().statistics() | {
            "weights": self.weights,
            "variant": self.variant,
            "prior": self.prior,
            "freeze_bos": self.freeze_bos,
        }
