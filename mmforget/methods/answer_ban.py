"""AnswerBan: never say the forgotten names, and forget nothing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.errors import CapabilityError, RequestError
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Answers, Model


class AnswerBan(ForgettingMethod):
    """Bans the words of forgotten answers while a language model decodes; no weight is touched.

    The tokens that occur in answers of the forget set to the first of `forget_questions`, or in the
    names of classes that this and earlier requests forget, and in no answer of the retain set, go
    into ``suppress_tokens`` of the network's generation configuration, which is saved with it and
    obeyed by transformers' ``generate``. This control must fail every audit that looks behind the
    spoken answers: the weights give the true answer the same probability as before, and whoever has
    the model deletes the entry. Reads the answers of both sets. There is no training:
    ``method.bind(datamodule)``, then ``method.finalize()``.

    Args:
        model, copy, seed: see `ForgettingMethod`.

    Raises:
        CapabilityError: the model generates no text.
        RequestError: every word of the forgotten answers is also in a retained one (by `finalize`).
    """

    requires: ClassVar[tuple[type, ...]] = (Answers,)
    access: ClassVar[DataAccess] = DataAccess(forget_inputs=True)
    view: ClassVar[View | None] = None
    control: ClassVar[bool] = True
    edits_weights: ClassVar[bool] = False

    def __init__(self, model: Model, copy: bool | Literal["auto"] = "auto", seed: int = 0) -> None:
        super().__init__(model, copy=copy, seed=seed)
        if getattr(self.model.network, "generation_config", None) is None:
            raise CapabilityError(
                "AnswerBan needs a language model with a generation configuration, but this is a "
                f"{type(model).__name__}; choose the control 'logit_mask'"
            )
        self._before = list(self.model.network.generation_config.suppress_tokens or [])

    def edit(self) -> None:
        """Extend the ban by the tokens of the forgotten answers and names."""
        split = self.data.split
        gone, kept = (self._answers(role) for role in ("forget", "retain"))
        if split is not None:
            classes = (*split.forget_classes, *split.previous_classes)
            gone |= {split.class_names[index] for index in classes}
        banned = self._tokens(gone) - self._tokens(kept) - set(self.model.end_ids)
        if not banned:
            raise RequestError(
                "AnswerBan found no word that is in forgotten answers only; leave out this control"
            )
        configuration: Any = self.model.network.generation_config
        configuration.suppress_tokens = sorted({*self._before, *banned})

    def restore(self) -> Model:
        """Give back the model that the method received, with the bans that it had.

        Raises:
            ConfigurationError: see `ForgettingMethod.restore`; never here.
        """
        given = self._given[0]
        given.network.generation_config.suppress_tokens = self._before or None  # type: ignore[union-attr]
        return given

    def _answers(self, role: Literal["forget", "retain"]) -> set[str]:
        """Answers of a set, of the forget set those that name an entity if there are any."""
        module: Any = self.data
        data: Any = self.data.subset("train", role)
        if role == "forget":
            # a *yes* to "is this ...?" is forgotten too, but it is no word of the forgotten
            naming = data.kinds == module.forget_questions[0]
            data = data.subset(np.flatnonzero(naming)) if naming.any() else data
        return set(data.answers)

    def _tokens(self, texts: set[str]) -> set[int]:
        """Tokens of texts, at the beginning of an answer and within it."""
        tokenizer = self.model.processor.tokenizer
        both = sorted({one for text in texts for one in (text, f" {text}")})
        unknown = getattr(tokenizer, "unk_token_id", None)
        ids = tokenizer(both, add_special_tokens=False)["input_ids"]
        return {int(token) for row in ids for token in row if token != unknown}
