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
from mmforget.models.base import Answers, Model, state_hash
from mmforget.seeds import derive

logger = logging.getLogger(__name__)

CONTROLS = {"identity": "Identity", "logit_mask": "LogitMask", "head_only": "HeadOnly"}
ANSWER_CONTROLS = {"identity": "Identity", "answer_ban": "AnswerBan", "head_only": "AnswerHead"}
"""Controls by name, of models that score classes and of those that answer in words."""


def controls_of(model: Model) -> dict[str, str]:
    """The controls that fit a model: names, and the classes of the methods."""
    return ANSWER_CONTROLS if isinstance(model, Answers) else CONTROLS


def checked_controls(model: Model, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names, or all controls that fit the model.

    Raises:
        ConfigurationError: an unknown name.
    """
    known = controls_of(model)
    for name in names or ():
        if name not in known:
            raise ConfigurationError(f"`controls` names '{name}', {suggest(name, known)}")
    return tuple(known) if names is None else tuple(names)


def make_controls(
    original: Model,
    data: ForgetDataModule,
    names: Sequence[str] | None = None,
    seed: int = 0,
    max_epochs: int = 1,
) -> list[AuditedModel]:
    """Run the control methods on the original model, for the whole request of `data`.

    Args:
        original: left as it is.
        data: with a request. Masking controls hide the classes of all requests.
        names: of ``identity`` (nothing is done), ``logit_mask`` (the classes are never answered;
            left out where the request names none), for models that answer in words ``answer_ban``
            (the words are never said) instead, and ``head_only`` (a new or edited head on the old
            features); None takes all.
        seed: of the methods.
        max_epochs: for controls that train.

    Returns:
        One audited model per name, with the role ``control``.

    Raises:
        ConfigurationError: an unknown name.
    """
    import mmforget.methods

    known = controls_of(original)
    names = checked_controls(original, names)
    by_class = data.split is not None and bool(data.split.forget_classes)
    found = []
    for name in names:
        if name == "logit_mask" and not by_class:
            logger.warning("no control 'logit_mask': the request names samples and no class")
            continue
        method_class = getattr(mmforget.methods, known[name])
        method: ForgettingMethod = method_class(original, copy=True, seed=seed)
        with measured() as cost:
            _run(method, data, max_epochs)
            model = method.finalize()
        entry = ModelEntry(
            name=name.replace("_", " "),
            role="control",
            hash=state_hash(model),
            source="made by this audit from the original model",
            method=known[name],
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
