"""Identity: the original model, as the control that every audit must fail."""

from __future__ import annotations

from typing import ClassVar

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.methods.base import ForgettingMethod


class Identity(ForgettingMethod):
    """Changes nothing and reads nothing; an audit that passes it measures nothing.

    Args:
        model, copy, seed: see `ForgettingMethod`.
    """

    access: ClassVar[DataAccess] = DataAccess(
        forget_inputs=False, forget_labels=False, retain="none", retain_labels=False
    )
    view: ClassVar[View | None] = None
    control: ClassVar[bool] = True
    expects_change: ClassVar[bool] = False
