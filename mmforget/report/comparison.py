"""Several audits of the same data side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mmforget.audit.results import Results
from mmforget.errors import DataError
from mmforget.report.content import Column, columns_of


@dataclass(frozen=True)
class Comparison:
    """Runs with distinct titles, and the columns of their common table.

    Attributes:
        runs: title and results.
        columns: the references of the first run, and every unlearned model of every run.
        remarks: what a reader must know before comparing.
    """

    runs: tuple[tuple[str, Results], ...]
    columns: tuple[Column, ...]
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Results]) -> Self:
        """Check that the runs can be compared, and arrange them.

        Raises:
            DataError: fewer than two runs, or they were measured on different data or splits.
        """
        if len(runs) < 2:
            raise DataError(f"a comparison needs at least two runs, got {len(runs)}")
        first = runs[0]
        for other in runs[1:]:
            for key, text in (("hash", "data"), ("split_hash", "split")):
                ours, theirs = first.data.get(key), other.data.get(key)
                if not ours or ours != theirs:
                    raise DataError(
                        f"'{first.title}' and '{other.title}' cannot be compared: their {text} "
                        f"hashes differ ({_short(ours)} and {_short(theirs)}); audit both on the "
                        "same data and requests"
                    )
        titles: list[str] = []
        for results in runs:
            same = sum(1 for earlier in runs[: len(titles)] if earlier.title == results.title)
            titles.append(f"{results.title} ({same + 1})" if same else results.title)
        references = [c for c in columns_of(first) if c.role != "unlearned"]
        original = [c for c in references if c.role == "original"]
        own = [
            Column(title, entry.name, "unlearned", ((results, entry.name),))
            for title, results in zip(titles, runs, strict=True)
            for entry in results.by_role("unlearned")
        ]
        rest = [c for c in references if c.role != "original"]
        remarks = []
        hashes = {entry.hash for results in runs for entry in results.by_role("original")}
        if len(hashes) > 1:
            remarks.append("The runs start from different original models.")
        remarks.append(f"Reference models are those of '{titles[0]}'.")
        return cls(tuple(zip(titles, runs, strict=True)), (*original, *own, *rest), tuple(remarks))


def _short(value: object) -> str:
    return str(value)[:12] if value else "not recorded"
