"""The models of an audit by their part in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

from mmforget.audit.results import Role
from mmforget.audit.scene import AuditedModel


class ComparedModels:
    """Models with unique names, exactly one of them the original.

    Attributes:
        models: in order.
        twin: by model the first one that answers the same, which is evaluated in its place.

    Args:
        models: in order.
        key: what models that answer the same have in common.
    """

    def __init__(
        self, models: Sequence[AuditedModel], key: Callable[[AuditedModel], Hashable]
    ) -> None:
        self.models = list(models)
        first: dict[Hashable, str] = {}
        self.twin = {
            one.entry.name: first.setdefault(key(one), one.entry.name) for one in self.models
        }

    @property
    def names(self) -> list[str]:
        """Names of all models, in order."""
        return [one.entry.name for one in self.models]

    @property
    def distinct(self) -> list[AuditedModel]:
        """The models without those that answer as an earlier one does (see `twin`)."""
        return [one for one in self.models if self.twin[one.entry.name] == one.entry.name]

    def by_role(self, role: Role) -> list[AuditedModel]:
        """The models that play a role, in order."""
        return [one for one in self.models if one.entry.role == role]

    def role_of(self, model: str) -> Role:
        """The part that a model plays."""
        return next(one.entry.role for one in self.models if one.entry.name == model)

    @cached_property
    def original(self) -> str:
        """Name of the original model."""
        return self.by_role("original")[0].entry.name

    @cached_property
    def retrained(self) -> list[str]:
        """Names of the retrained models, without those that were held out."""
        return [one.entry.name for one in self.by_role("retrained")]

    def references(self, model: str) -> list[str]:
        """The retrained models that a model is compared with: all but itself."""
        return [name for name in self.retrained if name != model]
