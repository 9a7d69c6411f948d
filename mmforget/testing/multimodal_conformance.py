"""The conformance checks of methods on a multimodal language model: by what it answers.

::

    from mmforget.testing.multimodal_conformance import MultimodalMethodChecks

    MultimodalMethodChecks(lambda model: MyMethod(model, lr=1e-3)).run_all()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from mmforget.data.base import ForgetDataModule
from mmforget.models.base import state_hash
from mmforget.models.multimodal import load_multimodal
from mmforget.testing.conformance import MakeMethod, MethodChecks, _require
from mmforget.testing.named_patterns import named_patterns, pattern_reader

MAX_WORDS = 8


class MultimodalMethodChecks(MethodChecks):
    """The conformance checks of one method on a tiny LLaVA that knows five persons.

    Args:
        method: makes the method for a model, with settings that forget within `epochs` epochs.
        data: makes the data with its request, equal at every call.
        epochs: length of a run, at least 2.
        forget_at_most: share in [0, 1] of right answers that may be left on the forget part of the
            test set.
        retain_drop: share in [0, 1] of right answers that may be lost on the retain part.
    """

    def __init__(
        self,
        method: MakeMethod,
        data: Callable[[], ForgetDataModule] = named_patterns,
        epochs: int = 2,
        forget_at_most: float = 0.35,
        retain_drop: float = 0.1,
    ) -> None:
        super().__init__(
            method,
            model=pattern_reader,
            data=data,
            epochs=epochs,
            forget_at_most=forget_at_most,
            retain_drop=retain_drop,
            load=load_multimodal,
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Those of every method, and ``frozen``."""
        return (*super().names(), "frozen")

    def poison(self) -> Callback:
        """Makes a trained weight NaN before the second batch: pictures hold no NaN."""
        return _PoisonedWeight()

    @torch.no_grad()
    def check_effect(self) -> None:
        """It forgets and retains by what is answered, or is a control that says so."""
        given, method, result = self.plain
        changed = state_hash(given) != state_hash(result)
        _require(
            method.no_op == (not changed and method.edits_weights),
            f"{self.name} reports `no_op={method.no_op}`",
        )
        if not method.expects_change:
            _require(not changed, f"{self.name} declares `expects_change=False`, but changes")
            return
        _require(
            changed or not method.edits_weights, f"{self.name} changed no parameter: it is a no-op"
        )
        before = {role: self.right(given, role) for role in ("forget", "retain")}
        after = {role: self.right(result, role) for role in ("forget", "retain")}
        _require(
            before["forget"] > self.forget_at_most + 0.3,
            f"the original answers only {before['forget']:.2f} of the forget set, so that "
            "forgetting cannot be seen",
        )
        _require(
            after["forget"] <= self.forget_at_most,
            f"{self.name} does not forget: right answers on the forget set went from "
            f"{before['forget']:.2f} to {after['forget']:.2f}, at most {self.forget_at_most:.2f} "
            "is accepted",
        )
        _require(
            after["retain"] >= before["retain"] - self.retain_drop,
            f"{self.name} does not retain: right answers on the retain set went from "
            f"{before['retain']:.2f} to {after['retain']:.2f}",
        )

    def check_frozen(self) -> None:
        """Weights that the method freezes keep their bits."""
        method = self.make(self.make_model())
        given = dict(self.plain.given.named_parameters())
        kept = [
            name.replace(".base_layer.", ".")
            for name, parameter in method.model.named_parameters()
            if not parameter.requires_grad and ".base_layer." not in name
        ]
        for name, parameter in self.plain.result.named_parameters():
            _require(
                name not in kept or torch.equal(parameter, given[name]),
                f"{self.name} freezes '{name}', but changes it",
            )

    def right(self, model: Any, role: str) -> float:
        """Share of the test questions of a role that a model answers exactly."""
        batch: Any = self.batch(role)  # type: ignore[arg-type]
        given = model.answer(batch["images"], batch["question"], max_new_tokens=MAX_WORDS)
        pairs = zip(given, batch["answer"], strict=True)
        return sum(one == other for one, other in pairs) / len(given)


class _PoisonedWeight(Callback):
    """Fills the first trained weight with NaN before the second batch."""

    seen = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called by Lightning."""
        self.seen += 1
        if self.seen == 2:
            with torch.no_grad():
                next(p for p in pl_module.model.parameters() if p.requires_grad).fill_(torch.nan)
