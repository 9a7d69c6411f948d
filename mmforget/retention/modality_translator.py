"""ModTr: train what stands in front of a detector, and leave the detector as it is."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import ForgetDataModule
from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    DivergenceError,
    ModelError,
    WeightsError,
    suggest,
)
from mmforget.methods.base import GradientMethod, OptimizerName, joined
from mmforget.models.base import Batch, HasLogits, HasLoss, Model, state_hash
from mmforget.models.detector import Detector
from mmforget.models.detectors.base import Objects
from mmforget.models.recipe import steps_of
from mmforget.models.translated_detector import (
    NOTES,
    Goal,
    TranslatedDetector,
    TranslatedNetwork,
    load_translated,
)
from mmforget.models.translators import Fusion, Translator, TranslatorNetwork
from mmforget.seeds import derive

__all__ = ["ModTr", "TranslatedDetector", "Translator", "load_translated"]

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 1.0
"""Detections with a shorter side, in pixels, are no labels to learn from."""


class ModTr(GradientMethod):
    r"""Train a translator in front of a frozen detector, for a new modality or against classes.

    The detector stays in eval mode, its BatchNorm statistics included, and no weight of it is ever
    trained: gradients only pass through it. So whatever it could do it still can, bit by bit, as
    soon as the translator is left out. With T the translator (see `Translator`):

    * ``goal="adapt"`` (the paper) fits another modality, such as infrared, from all training data
      (view ``full``; no request is needed)::

          L = loss_weight * mean detection loss of the translated pictures

      The detection loss of an image is `Detector.loss`: for torchvision the sum of all terms
      (classification, box, objectness, proposal box, centre-ness), each of which the paper weighs
      by 0.1; for the others the loss of the last decoder layer. There is no pixel term.

    * ``goal="suppress"`` (ours) makes the requested classes invisible (view ``paired``)::

          L = retain + beta * ReLU(bound - recognition(forget)) + match * loss(both, kept)

      with ``retain`` the detection loss of the retain images, ``recognition`` the mean recognition
      part on the forget images, and ``kept`` the boxes of the classes that stay which the frozen
      detector itself finds in the untranslated pictures with at least `confidence`: the translated
      picture shall show these, and nothing else. This is **suppression at the input**, no
      unlearning: whoever leaves out the translator has the class back.

    ::

        method = ModTr(detector, goal="adapt", pretrained=True)
        data.view = method.view
        Trainer(max_epochs=200, gradient_clip_val=0.5).fit(method, datamodule=data)
        translated = method.finalize()      # a TranslatedDetector; `translated.detector` bypasses

    Paper: batches of 8, 200 epochs, gradient clipping at 0.5 (the trainer's), the cosine steps
    after every optimizer step, and the checkpoint of the best validation AP50 is taken (a callback
    of yours: a checkpoint holds the translator only). Several processes give the result of one.

    Args:
        model: a trained `Detector`; it is not copied, since nothing of it changes. Its weights do
            not require gradients until `finalize`.
        goal: see above.
        translator: the encoder by its name, or a `Translator` to go on with, which is trained in
            place; the next four arguments then say nothing.
        fusion: see `Translator`. ``multiply`` only darkens; use ``none`` where a modality turns
            bright into dark.
        width: of the network ``small``; see `Translator`.
        levels: of the network ``small``; see `Translator`.
        pretrained: ImageNet weights for the encoder (a download, unless cached).
        seed: base of every random draw.
        lr: learning rate at the start.
        lr_min: at the end of the cosine.
        weight_decay: decoupled for ``adamw``, L2 for the others.
        optimizer: ``adamw``, ``adam`` or ``sgd`` (momentum 0.9).
        loss_weight: of the whole detection loss in ``adapt``, positive.
        beta: weight of the forget term in ``suppress``, not negative.
        bound: recognition loss, per image, at which the forget term stops; ``auto`` is the model's
            `forget_bound`.
        match: weight of what shall still be found, not negative.
        confidence: score in (0, 1) from which on the frozen detector's detections count.

    Raises:
        CapabilityError: the model is no detector.
        ConfigurationError: a setting out of range.

    Reference:
        Medeiros et al., Modality Translation for Object Detection Adaptation Without Forgetting
        Prior Knowledge, ECCV 2024, arXiv 2404.01492. ``suppress`` is ours.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasLogits)
    access: ClassVar[DataAccess] = DataAccess(retain="fraction")
    edits_weights: ClassVar[bool] = False

    hinge_open: Tensor

    def __init__(
        self,
        model: Model,
        goal: Goal = "adapt",
        translator: TranslatorNetwork | Translator = "resnet34",
        fusion: Fusion = "multiply",
        width: int = 16,
        levels: int = 3,
        pretrained: bool = False,
        seed: int = 0,
        lr: float = 1e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.01,
        optimizer: OptimizerName = "adamw",
        loss_weight: float = 0.1,
        beta: float = 0.2,
        bound: float | Literal["auto"] = "auto",
        match: float = 1.0,
        confidence: float = 0.5,
    ) -> None:
        super().__init__(
            model,
            copy=False,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
        )
        if not isinstance(model, Detector):
            raise CapabilityError(
                f"ModTr needs a Detector, but this is a {type(model).__name__}; load one with "
                "`load_detector`"
            )
        if goal not in get_args(Goal):
            raise ConfigurationError(f"`goal` is '{goal}', {suggest(goal, get_args(Goal))}")
        if not loss_weight > 0:
            raise ConfigurationError(f"`loss_weight` is {loss_weight}, it must be positive")
        for name, value in (("beta", beta), ("match", match)):
            if not value >= 0:
                raise ConfigurationError(f"`{name}` is {value}, it must not be negative")
        if not 0 < confidence < 1:
            raise ConfigurationError(f"`confidence` is {confidence}, it must lie in (0, 1)")
        self.bound = float(model.forget_bound if bound == "auto" else bound)
        if not self.bound > 0:
            raise ConfigurationError(f"`bound` is {bound}, it must be positive")
        self.goal: Goal = goal
        self.view = "full" if goal == "adapt" else "paired"  # type: ignore[misc]
        self.loss_weight, self.beta, self.match = loss_weight, beta, match
        self.confidence = confidence
        if not isinstance(translator, Translator):
            translator = Translator.seeded(
                seed,
                network=translator,
                fusion=fusion,
                width=width,
                levels=levels,
                pretrained=pretrained,
            )
        self.translator = translator.to(model.device)
        self._translator_hash = state_hash(self.translator)
        self.register_buffer("hinge_open", torch.zeros(2))  # steps with an open hinge, all steps
        self.model.requires_grad_(False)
        self.strict_loading = False  # checkpoints hold the translator only
        self.train()

    # ---- data -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the data; see `ForgettingMethod.setup`.

        Raises:
            ConfigurationError: there is nothing to suppress.
        """
        super().setup(stage)
        if self.goal == "suppress":
            self.gone()
        else:
            # There is no forget set to protect: a new modality is learnt from all of its data.
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            cast(ForgetDataModule, data).access = None

    def gone(self) -> tuple[int, ...]:
        """The classes that shall not be found, those of earlier requests included.

        Raises:
            ConfigurationError: the request names no classes.
        """
        split = self.data.split
        if split is None or not split.forget_classes:
            raise ConfigurationError(
                "ModTr with `goal` 'suppress' needs a request that names classes; call "
                "`datamodule.request(ForgetRequest(classes=...))`"
            )
        return split.forget_classes + split.previous_classes

    # ---- objective ------------------------------------------------------------------------------

    @property
    def network(self) -> TranslatedNetwork:
        """The frozen network with the translator in front of it."""
        return TranslatedNetwork(self.model.kind, self.translator)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The terms of the goal; see the class."""
        if self.goal == "adapt":
            objects = self.model.objects(batch)
            parts = self.network.losses(batch["image"], batch["extent"], objects)
            mean = self.global_mean(parts.total, batch["weight"])
            return {"detection": self.loss_weight * mean}
        both, n_forget = joined(batch)
        extent, weight = both["extent"], both["weight"]
        translated = self.network.translated(both["image"], extent)
        frozen = self.model.kind
        parts = frozen.losses(translated, extent, self.model.objects(both))
        terms = {
            "forget": self.beta * self.hinge(parts.recognition[:n_forget], weight[:n_forget]),
            "retain": self.global_mean(parts.total[n_forget:], weight[n_forget:]),
        }
        if self.match:
            kept = frozen.losses(translated, extent, self.kept_objects(both)).total
            terms["match"] = self.match * self.global_mean(kept, weight)
        return terms

    def hinge(self, recognition: Tensor, weight: Tensor) -> Tensor:
        """``ReLU(bound - mean)`` over the global batch, from (B,) recognition losses."""
        mean = self.global_mean(recognition, weight)
        # decided on the mean over all processes, so that they agree
        open_ = self.global_value(mean) < self.bound
        self.hinge_open += torch.stack([open_.float(), torch.ones_like(open_.float())])
        return torch.where(open_, self.bound - mean, torch.zeros_like(mean))

    @torch.no_grad()
    def kept_objects(self, batch: Batch) -> list[Objects]:
        """What the frozen detector finds in the untranslated pictures, of the classes that stay."""
        gone = torch.tensor(self.gone(), device=self.device)
        kept = []
        for one in self.model.detect(batch):
            sides = one.boxes[:, 2:] - one.boxes[:, :2]
            chosen = (one.scores >= self.confidence) & ~torch.isin(one.labels, gone)
            chosen &= (sides >= SMALLEST_SIDE).all(1)
            kept.append(Objects(one.boxes[chosen], one.labels[chosen]))
        return kept

    # ---- training -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> ModTr:
        """Set the mode of the translator; the detector is always in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def on_train_epoch_start(self) -> None:
        """Set modes, and key the global generator by epoch, so that resuming draws the same."""
        self.train()
        torch.manual_seed(derive(self.seed, "train", self.current_epoch, self.global_rank))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The translator; what has one dimension only is exempt from weight decay."""
        trained = [p for p in self.translator.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """The chosen optimizer, with a cosine over all steps that moves after each of them."""
        configured = super().configure_optimizers()
        steps = max(1, steps_of(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            configured["optimizer"], steps, self.lr_min
        )
        configured["lr_scheduler"] = {"scheduler": schedule, "interval": "step"}
        return configured

    # ---- checkpoints: the translator only -------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the translator and the method's own buffers; the detector is the model's."""
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if not name.startswith("model.")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another translator, since loading is not strict.

        Raises:
            WeightsError: a tensor is missing.
        """
        own = {name for name in self.state_dict() if not name.startswith("model.")}
        missing = sorted(own - set(checkpoint["state_dict"]))
        if missing:
            raise WeightsError(
                f"the checkpoint lacks {len(missing)} of {len(own)} tensors of the translator, "
                f"first '{missing[0]}'; it belongs to another translator or method"
            )

    # ---- the end --------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self) -> TranslatedDetector:
        """Return the detector with its translator, in eval mode.

        Raises:
            ModelError: something has changed the detector, which was to stay as it was.
            DivergenceError: a parameter of the translator is not finite.
        """
        detector = super().finalize()
        if state_hash(detector) != self._start_hash:
            raise ModelError(
                "the detector behind the translator has changed while the translator was trained; "
                "load it again, let nothing else train it, and choose no `precision` of the "
                "trainer that converts weights, such as 'bf16-true'"
            )
        for name, parameter in self.translator.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergenceError(
                    f"ModTr ended with non-finite values in '{name}' of the translator; "
                    "lower the learning rate"
                )
        self.no_op = state_hash(self.translator) == self._translator_hash
        if self.no_op:
            logger.warning("ModTr changed no parameter of the translator: it was not trained")
        self.translator.zero_grad(set_to_none=True)
        return TranslatedDetector(cast(Detector, detector), self.translator, self.goal).eval()

    def restore(self) -> Model:
        """Give back the detector, which is as it was."""
        return self._given[0]

    def statistics(self) -> dict[str, Any]:
        """What was trained, and what may be claimed for it."""
        found: dict[str, Any] = {
            "goal": self.goal,
            "claim": NOTES[self.goal],
            "translator": dict(self.translator.settings),
            "trainable_parameters": sum(p.numel() for p in self.translator.parameters()),
        }
        if self.goal == "suppress":
            found["hinge_bound"] = self.bound
            found["hinge_open_share"] = float(self.hinge_open[0] / self.hinge_open[1].clamp(min=1))
        return found
