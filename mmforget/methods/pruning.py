"""The frame of the methods that find memories in weights and take these weights out."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from mmforget import __version__
from mmforget.concept import normalised
from mmforget.data.memorized import MemorizedSet
from mmforget.errors import ConfigurationError, RequestError
from mmforget.methods.memorization import MemorizationMethod
from mmforget.models.base import Model, state_hash
from mmforget.models.weight_edit import WeightEdit
from mmforget.models.weight_mask import Removed, WeightMask

logger = logging.getLogger(__name__)

CROWDED = 0.25
"""Density of a layer from which on a warning is due: so much cannot be one memory."""


class PruningMethod(MemorizationMethod):
    """Base of the methods that locate a `WeightMask` and set its weights to zero.

    Biases stay, and nothing is rescaled, unless a method says otherwise. Locating happens in
    `finalize`, or earlier by a call of `locate_mask`.

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`.
    """

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(model, memorized, copy=copy, seed=seed)
        self._mask: WeightMask | None = None
        self._removed: Removed | None = None
        self._report: dict[str, Any] = {}
        self._base_hash = state_hash(self.model.network)

    # ---- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def locate(self) -> WeightMask:
        """Find the weights; changes nothing. Called once."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the mask, plain data."""

    def described(self, masks: Any, **facts: Any) -> WeightMask:
        """A mask with its origin.

        Args:
            masks: per parameter name (out, in) or (out,) bool.
            facts: further metadata, such as ``unit`` and ``columns``.
        """
        return WeightMask.described(
            self.model,
            masks,
            self._base_hash,
            method=type(self).__name__,
            method_version=__version__,
            seed=self.seed,
            memorized_hash=self.memorized.hash,
            settings=self.settings(),
            **facts,
        )

    # ---- the edit -------------------------------------------------------------------------------

    @property
    def mask(self) -> WeightMask:
        """What was located.

        Raises:
            ConfigurationError: nothing has been located yet.
        """
        if self._mask is None:
            raise ConfigurationError(
                f"{type(self).__name__} has no mask yet; call `method.finalize()` first"
            )
        return self._mask

    def locate_mask(self) -> WeightMask:
        """Locate now instead of in `finalize`; the model stays as it is.

        A further call returns the same mask.
        """
        if self._mask is None:
            start = time.perf_counter()
            self._mask = self.locate()
            self._report["seconds"] = time.perf_counter() - start
            density = self._mask.density()
            self._report |= {"removed": self._mask.count, "density": density}
            worst = max(density["layers"], key=lambda name: density["layers"][name])
            if density["layers"][worst] > CROWDED:
                logger.warning(
                    "%s takes out %.0f%% of '%s'; so much hurts every picture, choose less",
                    type(self).__name__,
                    100 * density["layers"][worst],
                    worst,
                )
        return self._mask

    def edit(self) -> None:
        """Locate, and set the located weights to zero."""
        # The weights are those that were just looked at, so that their hash needs no second check.
        self._removed = self.locate_mask().apply(self.model, check_base=False)

    def weight_edit(self) -> WeightEdit:
        """The changed parameters, whole; `mask` says the same in far fewer bytes.

        Raises:
            ConfigurationError: the edit has not been made yet.
        """
        edit = self.mask.weight_edit(self.model)
        edit.metadata |= self.statistics()
        return edit

    def save_adapter(self, folder: Path) -> None:
        """Write the mask, and the changed parameters as an edit."""
        super().save_adapter(folder)
        self.mask.save(folder)

    def statistics(self) -> dict[str, Any]:
        """What was read, and after `finalize` density, number of weights and seconds."""
        return {**super().statistics(), **self._report}

    def restore(self) -> Model:
        """Give back the model that the method received; exact also after an edit in place."""
        if self.copied:
            return super().restore()
        if self._removed is not None:
            self._removed.restore()
        return cast(Model, self.model)


def base_prompts(memorized: MemorizedSet, base: Sequence[str] | None) -> tuple[str, ...] | None:
    """Check the prompts that memorized ones are compared with.

    Args:
        memorized: what is looked for.
        base: texts, or None for a method's own choice.

    Raises:
        RequestError: no texts, or one of them is memorized, so that there is no difference.
    """
    if base is None:
        return None
    if isinstance(base, str):
        raise RequestError(f"`base` is the text '{base[:60]}'; give a list of texts")
    found = tuple(base)
    if not found:
        raise RequestError("`base` is empty; give prompts that are not memorized, or None")
    targets = {normalised(text) for text in memorized.texts}
    for text in found:
        if normalised(text) in targets:
            raise RequestError(
                f"'{text}' is memorized and also in `base`, so that there is no difference to "
                "find; remove it from one of them"
            )
    return found
