"""Models that an audit needs beside the audited ones: controls that must fail, a lower anchor."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

from mmforget.audit.cost import measured
from mmforget.audit.results import ModelEntry
from mmforget.audit.scene import AuditedModel
from mmforget.data.base import ForgetDataModule
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Model, state_hash
from mmforget.seeds import derive

logger = logging.getLogger(__name__)

CONTROLS = {"identity": "Identity", "logit_mask": "LogitMask", "head_only": "HeadOnly"}


def make_controls(
    original: Model,
    data: ForgetDataModule,
    names: Sequence[str] = tuple(CONTROLS),
    seed: int = 0,
    max_epochs: int = 1,
) -> list[AuditedModel]:
    """Run the control methods on the original model, for the whole request of `data`.

    Args:
        original: left as it is.
        data: with a request. Masking controls hide the classes of all requests.
        names: of ``identity`` (nothing is done), ``logit_mask`` (the classes are never answered;
            left out where the request names none) and ``head_only`` (a new head on the old
            features).
        seed: of the methods.
        max_epochs: for controls that train.

    Returns:
        One audited model per name, with the role ``control``.

    Raises:
        ConfigurationError: an unknown name.
    """
    import mmforget.methods

    for name in names:
        if name not in CONTROLS:
            raise ConfigurationError(f"`controls` names '{name}', {suggest(name, CONTROLS)}")
    by_class = data.split is not None and bool(data.split.forget_classes)
    found = []
    for name in names:
        if name == "logit_mask" and not by_class:
            logger.warning("no control 'logit_mask': the request names samples and no class")
            continue
        method_class = getattr(mmforget.methods, CONTROLS[name])
        method: ForgettingMethod = method_class(original, copy=True, seed=seed)
        with measured() as cost:
            _run(method, data, max_epochs)
            model = method.finalize()
        entry = ModelEntry(
            name=name.replace("_", " "),
            role="control",
            hash=state_hash(model),
            source="made by this audit from the original model",
            method=CONTROLS[name],
            access=method.access.to_dict(),
            cost=cost.to_dict() | method.cost(),
            details=method.statistics(),
        )
        found.append(AuditedModel(entry, model))
    return found


def _run(method: ForgettingMethod, data: ForgetDataModule, max_epochs: int) -> None:
    if method.view is None:
        method.bind(data)
        return
    from lightning.pytorch import Trainer

    own = copy.copy(data)  # the view and the trainer of the caller's data stay as they are
    own.view = method.view
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="gpu" if method.model.device.type == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(method, datamodule=own)


def random_init(original: Model, seed: int = 0) -> AuditedModel:
    """The original's architecture with fresh weights: the lower anchor of probes and relearning.

    Raises:
        ModelError: the network was given as an object, so nobody knows how it is built.
    """
    model = original.fresh(derive(seed, "anchor")).to(original.device).eval()
    entry = ModelEntry(
        name="random init",
        role="random_init",
        hash=state_hash(model),
        source="the original's architecture with fresh weights",
    )
    return AuditedModel(entry, model)
