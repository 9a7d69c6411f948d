"""The frame of the methods that take memorized pictures out of a text-to-image model."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.data.memorized import MemorizedSet
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Generates, Model, Sites, TextConditioned
from mmforget.models.weight_edit import WeightEdit


class MemorizationMethod(ForgettingMethod):
    """Base of all methods that make a model forget pictures which it has memorized.

    Args:
        model: a text-to-image model, such as `DiffusionGenerator`.
        memorized: the prompts that the method may read, with all that belongs to them. Keep some
            back (`MemorizedSet.split`): a method that only blocks the prompts it has seen has not
            found the memory.
        copy, seed: see `ForgettingMethod`.

    Raises:
        RequestError: a prompt that the text encoder would truncate.
    """

    requires: ClassVar[tuple[type, ...]] = (TextConditioned, Generates, Sites)
    access: ClassVar[DataAccess] = DataAccess(
        forget_inputs=False, forget_labels=False, retain="none", retain_labels=False
    )
    view: ClassVar[View | None] = None
    saves_adapter: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(model, copy=copy, seed=seed)
        self.memorized = memorized
        self.model.check_length(memorized.texts)

    @abstractmethod
    def weight_edit(self) -> WeightEdit:
        """What `finalize` changed, as a thing of its own."""

    def save_adapter(self, folder: Path) -> None:
        """Write what was changed into a folder."""
        self.weight_edit().save(folder)

    def statistics(self) -> dict[str, Any]:
        """How many prompts were read, and of which kinds."""
        return {
            "memorized_prompts": len(self.memorized),
            "kinds": list(self.memorized.kinds),
            "memorized_hash": self.memorized.hash,
        }
