"""What a method may read: declared by it, enforced by the data module, printed in reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DataAccess:
    """Declaration of the data that a method reads.

    Args:
        forget_inputs: inputs of the forget set.
        forget_labels: labels of the forget set.
        retain: ``none``; ``statistics`` (one pass, sums only); ``fraction`` (a subset is enough);
            ``full``.
        retain_labels: labels of the retain set.
        training_hooks: the method must be present while the original model is trained.
    """

    forget_inputs: bool = True
    forget_labels: bool = True
    retain: Literal["none", "statistics", "fraction", "full"] = "full"
    retain_labels: bool = True
    training_hooks: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for manifests and reports."""
        return asdict(self)
