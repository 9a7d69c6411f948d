"""The frame of the methods that make the generator of a GAN forget what words name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmforget.concept import ConceptSpec, check_together
from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.data.latent_pool import LatentRecords
from mmforget.data.record_stream import RecordStream
from mmforget.errors import ConfigurationError
from mmforget.methods.base import GradientMethod, detached_copy
from mmforget.methods.generator_retention import RetainDistance, pixel_distance, retain_distance
from mmforget.methods.latent_sorting import sort_latents
from mmforget.methods.layer_selection import trained_groups
from mmforget.methods.text_guided import NO_DATA, at_least_one
from mmforget.models.base import Generates, HasLatents, Latents, Model
from mmforget.models.clip import ClipModel
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.latent_mapper import BATCH_SIZE, LatentMapper, MapperReport, train_mapper

logger = logging.getLogger(__name__)

ClipSource = ClipModel | str | Path


class GeneratorMethod(GradientMethod):
    """Base of the methods that fine-tune a generator from text, without any picture.

    Before the training, the original generator draws a pool of latents. The guide sorts them: those
    that show a concept (*bearing*), those that do not (*clear*), and those in between, which are
    left out. Steps draw from the first two. Training happens in eval mode: BatchNorm statistics
    stay those of the original. Needs no data module: ``Trainer(max_steps=300).fit(method)``.

    Subclasses implement `losses`, with `drawn`, `kept` and `retained` at their service, and may
    add to `prepare`, with `train_mappers` at its service.

    Args:
        model: the generator, such as `ImageGAN`.
        concepts: what to erase, one or several at once.
        guide: the CLIP model that is followed, or several, or their folders or hub ids; None only
            for methods that say so.
        alternatives: per target what else a picture could show, or a list for a single concept;
            see `ConceptGuide`.
        copy, seed, lr: see `GradientMethod`; the optimizer is Adam with betas 0.5 and 0.99, and the
            rate falls to a tenth along a cosine over all steps.
        batch_size: bearing latents per step, over all processes.
        retain_batch_size: clear latents per step.
        pool: latents that are sorted.
        bearing: probability above which a latent shows a concept.
        clear: probability below which it does not.
        retain: distance of pictures that must stay: ``pixel`` or ``embedding``.
        retain_weight: of that distance.
        train_layers: see `trained_groups`.
        clip: largest norm of a step's gradient.

    Raises:
        RequestError: contradictory concepts, or words that the guide cannot tell apart; at the
            start of the training, a concept that the generator hardly draws, or draws always.
        ConfigurationError: a setting out of range.
    """

    requires: ClassVar[tuple[type, ...]] = (Generates, HasLatents)
    access: ClassVar[DataAccess] = NO_DATA
    view: ClassVar[View | None] = "paired"
    needs_guide: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource] | None,
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
        retain_weight: float = 10.0,
        train_layers: str = "all",
        clip: float = 5.0,
    ) -> None:
        specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
        check_together(specs)
        at_least_one(batch_size=batch_size, retain_batch_size=retain_batch_size, pool=pool)
        if not 0 < clear <= bearing < 1:
            raise ConfigurationError(
                f"`clear` is {clear} and `bearing` {bearing}; they must satisfy "
                "0 < clear <= bearing < 1"
            )
        for name, value in (("retain_weight", retain_weight), ("clip", clip)):
            if not value >= 0:
                raise ConfigurationError(f"`{name}` is {value}, it must be 0 or more")
        # In a tuple, so that its weights are not registered as a part of the method.
        self._guide: tuple[ConceptGuide, ...] = ()
        if guide is not None:
            self._guide = (ConceptGuide(guide, specs, named_alternatives(alternatives, specs)),)
        elif self.needs_guide:
            raise ConfigurationError(
                f"`guide` of {type(self).__name__} is None; give a CLIP model, its folder or hub id"
            )
        self.retain_name = retain
        # Only the plain distance does without a guide.
        plain = retain == "pixel"
        distance = pixel_distance if plain else retain_distance(retain, self.guide)
        super().__init__(model, copy=copy, seed=seed, lr=lr, lr_min=lr / 10, optimizer="adam")
        self.concepts = specs
        self._distance = (distance,)
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.pool_size, self.bearing, self.clear = pool, bearing, clear
        self.retain_weight, self.clip, self.train_layers = retain_weight, clip, train_layers
        groups = self.model.layer_groups()
        known = self._guide[0] if self._guide else None
        chosen = trained_groups(self.model, train_layers, known, seed)
        self._names = [name for group in chosen for name in groups[group]]
        self.model.requires_grad_(False)
        for name in self._names:
            self.model.network.get_parameter(name).requires_grad_(True)
        self._original = (model if self.copied else detached_copy(model),)
        self.records: dict[str, LatentRecords] = {}
        self.prevalence: dict[str, float] = {}
        self.mapper_reports: list[MapperReport] = []
        self._warn_of_size()

    def _warn_of_size(self) -> None:
        """Say so where the guide gets pictures that are far smaller than what it was trained on."""
        side = max(getattr(self.model, "resolution", (0,)))
        for clip in self._guide[0].clips if self._guide else ():
            size = getattr(clip, "preprocess", {}).get("size", 0)  # unknown for encoders of users
            wanted = size if isinstance(size, int) else max(size)
            if 0 < side < wanted / 2:
                logger.warning(
                    "the generator draws pictures of %d pixels, which the guide sees enlarged to "
                    "%d; read `prevalence` and the audit's agreement of guide and judge", side,
                    wanted,
                )  # fmt: skip

    # ---- for subclasses -------------------------------------------------------------------------

    @property
    def guide(self) -> ConceptGuide:
        """The guide.

        Raises:
            ConfigurationError: the method was not given one.
        """
        if not self._guide:
            raise ConfigurationError(
                f"this setting of {type(self).__name__} needs a `guide`; give a CLIP model"
            )
        return self._guide[0]

    @property
    def original(self) -> Any:
        """The frozen generator as it was given."""
        return self._original[0]

    @property
    def distance(self) -> RetainDistance:
        """The distance of what must stay."""
        return self._distance[0]

    def prepare(self) -> None:
        """What a subclass does once before training, after the pool has been sorted."""

    @torch.enable_grad()
    def train_mappers(
        self, steps: int, tries: int, scale: float = 1.0
    ) -> list[tuple[LatentMapper, Tensor]]:
        """Train a latent mapper per concept on the original generator, for `prepare`.

        Leaves `mapper_reports`, and counts the samples of all trainings.

        Args:
            steps: of each training.
            tries: trainings of a mapper until it elicits its concept, at most.
            scale: of the mapper's steps, at the first try.

        Returns:
            Per concept the mapper, of the space ``z``, and the unit direction (d,) in which it
            moves the guide's embedding on average.

        Raises:
            ConfigurationError: a count below 1.
        """
        found = []
        for number in range(len(self.concepts)):
            mapper, direction, report = train_mapper(
                self.original, self.guide, number, steps=steps, scale=scale, tries=tries,
                seed=self.seed, space="z", purpose=f"mapper-{number}",
            )  # fmt: skip
            found.append((mapper, direction))
            self.mapper_reports.append(report)
            passes = report.tries * report.steps * BATCH_SIZE
            self.spend(forget=passes, backward=True)
        return found

    def drawn(self, batch: Mapping[str, Tensor]) -> Latents:
        """The latents of a batch."""
        return Latents(batch["codes"], batch.get("label"))

    @torch.no_grad()
    def kept(self, latents: Latents) -> Tensor:
        """What the original generator draws from latents."""
        found: Tensor = self.original.synthesise(latents)
        return found

    def retained(self, images: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        """The retain loss: the mean distance of pictures (B, 3, H, W), times its weight."""
        return self.retain_weight * self.global_mean(self.distance(images, kept), weight)

    # ---- data -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Sort the pool; the same on every process and after a resume.

        Lightning calls it before it loads a checkpoint, and before it moves the model.
        """
        if self.records:
            return
        device = self.trainer.strategy.root_device
        self.model.to(device).eval()
        self.original.to(device).eval()
        for guide in self._guide:
            guide.to(device)
        self.original.check_drawing()
        self._sort()
        self.prepare()
        if self.global_rank:
            self.sample_passes.zero_()  # every process has done the same, which counts once

    def pool(self) -> Latents:
        """The latents that are sorted."""
        found: Latents = self.original.draw(self.pool_size, self.seed, purpose="-pool")
        return found

    def _sort(self) -> None:
        latents = self.pool()
        self.records, self.prevalence = sort_latents(
            self.original, self.guide, latents, self.bearing, self.clear
        )
        self.spend(retain=len(latents))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of bearing and of clear latents."""
        sizes = {"forget": self.batch_size, "retain": self.retain_batch_size}
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(RecordStream(self.records, sizes, self.seed, first), batch_size=None)

    # ---- training -------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """BatchNorm statistics must stay those of the original."""
        self.model.eval()

    def teardown(self, stage: str) -> None:
        """Nothing to lift: there is no data module."""

    def configure_optimizers(self) -> Any:
        """Adam with a cosine over all steps."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, self.lr, betas=(0.5, 0.99))
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, self.lr_min)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the method's norm, unless the trainer has one."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.clip, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---- the end --------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """The concepts, what the pool showed, and what was trained, mappers too."""
        facts = {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "guide": self._guide[0].describe() if self._guide else None,
            "prevalence": self.prevalence,
            "pool": {name: len(records) for name, records in self.records.items()},
            "train_layers": self.train_layers,
            "trained_parameters": sum(
                self.model.network.get_parameter(name).numel() for name in self._names
            ),
        }
        if self.mapper_reports:
            facts["mappers"] = [report.to_dict() for report in self.mapper_reports]
        return facts


def named_alternatives(
    given: Mapping[str, Sequence[str]] | Sequence[str] | None, concepts: Sequence[ConceptSpec]
) -> dict[str, Sequence[str]]:
    """Alternatives by target; a plain list belongs to a single concept.

    Raises:
        ConfigurationError: a list for several concepts, or a text in place of a list.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        found = dict(given)
    elif len(concepts) == 1:
        found = {concepts[0].target: given}
    else:
        raise ConfigurationError(
            f"`alternatives` is a list, but there are {len(concepts)} concepts; give a list for "
            "each of them, by its target"
        )
    for target, others in found.items():
        if isinstance(others, str):
            raise ConfigurationError(
                f"`alternatives` of '{target}' is the text '{others}', it must be a list of texts"
            )
    return found
