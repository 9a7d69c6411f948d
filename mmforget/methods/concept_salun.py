"""SalUn for diffusion: pseudo prompts, learned only by the weights salient for the concept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.data.denoising import (
    DenoisingRecords,
    MadePictures,
    made_pictures,
    noised_records,
    spread,
)
from mmforget.errors import ConfigurationError, DataError
from mmforget.methods.base import OptimizerName
from mmforget.methods.denoiser_weights import WeightSet, parameters_of, select_weights
from mmforget.methods.saliency import (
    Freeze,
    MaskedTraining,
    check_mask,
    flat_gradients,
    most_salient,
)
from mmforget.methods.text_guided import DenoisingMethod, at_least_one
from mmforget.models.base import Model

logger = logging.getLogger(__name__)


class ConceptSalUn(MaskedTraining, DenoisingMethod):
    """Answer the concept's prompt as another prompt, with the most salient weights alone.

    On noisy pictures x_t of the concept, the student learns
    ``e_student(x_t, concept) = e(x_t, pseudo)`` with the frozen model e, and the ordinary diffusion
    loss on pictures of what is preserved, times `retain_weight`. The released code asks the student
    itself for the pseudo answer, and encodes the picture twice with different draws; here both
    sides see one latent.

    Saliency is ``|sum of gradients|`` of the diffusion loss over the concept's pictures, at the
    frozen weights: absolute value after the sum. The share `mask_fraction` of all chosen weights
    with the largest values is trained; all others keep their bits, also under weight decay and
    momentum.

    Args:
        model, concepts, copy: see `ConceptMethod`. Synonyms are erased too; all sentences of a
            concept are used.
        weights: see `mmforget.methods.denoiser_weights.select_weights`.
        mask_fraction: share of the chosen weights that is trained, in (0, 1]; 0.5 in the paper.
        mask_guidance: w of the guided prediction ``(1 + w) e(x_t, c) - w e(x_t, 0)`` whose loss
            gives the saliency; 0 is the plain diffusion loss.
        freeze: ``strict`` as above; ``grad_only`` masks gradients and lets weight decay and
            momentum through, as the released code does.
        pseudo: what the concept's prompt is taken for; None takes the preserved texts in turn, one
            per sentence, and the anchor where nothing is preserved.
        images: (N, 3, H, W) in [0, 1], pictures of the concept to use instead of those that the
            model makes; for several concepts, one tensor per target.
        pictures: of each concept of weight 1, over all its words and sentences.
        retain_pictures: of the preserved texts; None takes as many as `pictures`, and at least one
            per text.
        times: noise levels per picture.
        steps, guidance: for making the pictures.
        seed, lr, weight_decay, optimizer: see `DenoisingMethod`.
        batch_size, retain_batch_size, retain_weight, clip: see `DenoisingMethod`.

    Raises:
        ConfigurationError: a setting out of range.
        DataError: `images` of another shape, or for another concept.
        NoOpError: no weight is salient.

    Reference:
        C. Fan, J. Liu, Y. Zhang, E. Wong, D. Wei, S. Liu: SalUn: Empowering Machine Unlearning via
        Gradient-based Weight Saliency, ICLR 2024, arXiv 2310.12508.
    """

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        weights: WeightSet = "all",
        mask_fraction: float = 0.5,
        mask_guidance: float = 0.0,
        freeze: Freeze = "strict",
        pseudo: str | None = None,
        images: Tensor | Mapping[str, Tensor] | None = None,
        pictures: int = 64,
        retain_pictures: int | None = None,
        times: int = 8,
        steps: int = 50,
        guidance: float = 3.0,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adam",
        batch_size: int = 8,
        retain_batch_size: int = 8,
        retain_weight: float = 0.5,
        clip: float = 1.0,
    ) -> None:
        check_mask(mask_fraction, freeze)
        if not mask_guidance >= 0:
            raise ConfigurationError(f"`mask_guidance` is {mask_guidance}, it must be 0 or more")
        at_least_one(
            pictures=pictures,
            retain_pictures=retain_pictures,
            times=times,
            steps=steps,
        )
        self.weights, self.mask_fraction, self.mask_guidance = weights, mask_fraction, mask_guidance
        self.freeze_mode, self.pseudo = freeze, pseudo
        self.pictures, self.retain_pictures, self.times = pictures, retain_pictures, times
        self.steps, self.guidance = steps, guidance
        self._made: list[MadePictures] = []
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
        self.images = self._checked(images)
        if pseudo is not None:
            self.model.check_length(
                [p for concept in self.concepts for p in concept.prompts(pseudo)]
            )
        if not self.preserved:
            logger.warning(
                "ConceptSalUn has no preserved concepts, so that nothing else is held; "
                "give some in `concept.preserve`"
            )
        size = sum(p.numel() for p in self._trained())
        # A buffer, so that the mask comes back from other processes.
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool))

    def _checked(self, images: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        targets = [concept.target for concept in self.concepts]
        if images is None:
            return {}
        if isinstance(images, Tensor):
            if len(targets) > 1:
                raise DataError(
                    f"`images` is one tensor for {len(targets)} concepts; give one per target, "
                    f"such as {{'{targets[0]}': ...}}"
                )
            images = {targets[0]: images}
        for name, given in images.items():
            if name not in targets:
                raise DataError(f"`images` has pictures of '{name}', which is no target")
            if given.ndim != 4 or given.shape[1] != 3 or not len(given):
                raise DataError(
                    f"`images` of '{name}' have shape {tuple(given.shape)}, need (N, 3, H, W)"
                )
        return dict(images)

    def trained(self) -> list[nn.Parameter]:
        """The chosen weights."""
        return parameters_of(select_weights(self.model, self.weights))

    # ---- records --------------------------------------------------------------------------------

    def forget_records(self) -> DenoisingRecords:
        """Noisy pictures of the concepts, with the answers to the pseudo prompts."""
        self._made = []
        return DenoisingRecords.join([self._records_of(concept) for concept in self.concepts])

    def _records_of(self, concept: ConceptSpec) -> DenoisingRecords:
        words = [concept.prompts(word) for word in concept.words]
        counts = spread(words, max(1, round(self.pictures * concept.weight)))
        prompts = [words[word][sentence] for word, sentence in counts]
        if concept.target in self.images:
            made = self._encoded(self.images[concept.target], prompts)
        else:
            made = made_pictures(
                self.model, prompts, list(counts.values()), self.steps, self.guidance, self.seed
            )
        self._made.append(made)
        others = [self.pseudo] if self.pseudo is not None else concept.preserve
        others = others or [concept.anchor_text]
        teachers = [
            concept.prompts(others[number % len(others)])[sentence]
            for number, (_, sentence) in enumerate(counts)
        ]
        records = noised_records(self.model, made, self.times, self.seed, teacher=teachers)
        records.passes += made.passes
        return records

    def _encoded(self, images: Tensor, prompts: Sequence[str]) -> MadePictures:
        device = next(self.model.network.parameters()).device
        latents = torch.cat(
            [self.model.to_latents(part.to(device)).float().cpu() for part in images.split(4)]
        )
        return MadePictures(latents, torch.arange(len(latents)) % len(prompts), tuple(prompts), 0)

    def retain_records(self) -> DenoisingRecords | None:
        """Noisy pictures of what is preserved, with the truth."""
        shares = self.shared_out(self.retain_pictures, self.pictures)
        if not shares:
            return None
        made = made_pictures(
            self.model,
            list(shares),
            list(shares.values()),
            self.steps,
            self.guidance,
            self.seed,
        )
        records = noised_records(self.model, made, self.times, self.seed)
        records.passes += made.passes
        return records

    # ---- the mask -------------------------------------------------------------------------------

    def _make_records(self) -> None:
        """Make records and, while the model is still the frozen one, the mask."""
        super()._make_records()
        total = torch.zeros(len(self.mask), device=self.device)
        for made in self._made:
            total += self._gradient(noised_records(self.model, made, self.times, self.seed))
        self.mask.copy_(most_salient(total, self.mask_fraction, type(self).__name__))
        self._made = []

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def _gradient(self, records: DenoisingRecords) -> Tensor:
        """Summed gradient (P,) of the diffusion loss over records with true targets."""
        trained, total = self._trained(), torch.zeros(len(self.mask), device=self.device)
        table, empty = self.model.encode(list(records.prompts)), self.model.unconditional()
        w = self.mask_guidance
        for start in range(0, len(records), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(records)))
            batch = {key: value.to(self.device) for key, value in records[list(rows)].items()}
            noisy = batch["noisy"].to(self._type)
            found = self.model.predict(noisy, batch["time"], table[batch["prompt"]])
            if w:
                plain = empty[torch.zeros(len(noisy), dtype=torch.long, device=self.device)]
                found = (1 + w) * found - w * self.model.predict(noisy, batch["time"], plain)
            error = (found.float() - batch["target"]).square().flatten(1).mean(1)
            total += flat_gradients(error.sum(), trained)
            if self.global_rank == 0:
                self.spend(forget=len(noisy) * (2 if w else 1), backward=True)
        return total

    def statistics(self) -> dict[str, Any]:
        """The concepts, the share of the weights that was trained, and how others were held."""
        return super().statistics() | {
            "weights": self.weights,
            "mask_fraction": float(self.mask.double().mean()),
            "freeze": self.freeze_mode,
        }
