"""RejectionFilter: draw again as long as a guide sees what shall not be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec, check_together
from mmforget.errors import ConfigurationError, RequestError, suggest
from mmforget.methods.generator_editing import ClipSource, named_alternatives
from mmforget.models.base import Generates, HasLatents, Latents, Model, check_capabilities, frozen
from mmforget.models.concept_guide import ConceptGuide

FILTER_NOTE = "filter; weights unchanged"
"""What every report says of a filter."""


@dataclass(frozen=True)
class FilterReport:
    """What a filter has done so far.

    Attributes:
        pictures: that were handed out.
        drawn: all that were drawn for them.
        most_tries: for a single picture.
    """

    pictures: int = 0
    drawn: int = 0
    most_tries: int = 0

    @property
    def acceptance(self) -> float:
        """Share of what was drawn that was handed out; not a number before the first picture."""
        return self.pictures / self.drawn if self.drawn else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "pictures": self.pictures, "drawn": self.drawn, "acceptance": self.acceptance,
            "most_tries": self.most_tries, "note": FILTER_NOTE,
        }  # fmt: skip


class RejectionFilter:
    """Draws each picture anew until the guide sees none of the concepts in it.

    This is no unlearning: the weights are those of the original, whoever has them can leave the
    filter out, and what the guide does not see passes. It is what removal from the weights has to
    compare with. A picture that passes at the first try is the one that the generator draws without
    filter.

    ::

        filtered = RejectionFilter(model, ConceptSpec("seven"), load_clip("digit_world"))
        images = filtered.generate(n=100)
        filtered.report.acceptance

    Args:
        model: a generator, such as `ImageGAN`; nothing of it changes.
        concepts: what shall not be seen.
        guide: a CLIP model, or several, or their folders or hub ids.
        alternatives: see `ConceptGuide`.
        threshold: a picture passes if the probability of every concept is below it.
        tries: per picture, at most.

    Raises:
        CapabilityError: the model has no latents.
        RequestError: see `ConceptGuide`.
        ConfigurationError: a setting out of range.
    """

    note = FILTER_NOTE

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        threshold: float = 0.2,
        tries: int = 50,
    ) -> None:
        specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
        check_together(specs)
        check_capabilities("RejectionFilter", model, (Generates, HasLatents))
        if not 0 < threshold <= 1:
            raise ConfigurationError(f"`threshold` is {threshold}, it must lie in (0, 1]")
        if tries < 1:
            raise ConfigurationError(f"`tries` is {tries}, it must be at least 1")
        self.model: Any = model
        self.concepts = specs
        self.guide = ConceptGuide(guide, specs, named_alternatives(alternatives, specs))
        self.threshold, self.tries = threshold, tries
        self.report = FilterReport()

    @property
    def network(self) -> nn.Module:
        """The generator's own network, as it is."""
        return self.model.network  # type: ignore[no-any-return]

    def generate(self, condition: Sequence[str] = ("",), n: int = 1, seed: int = 0) -> Tensor:
        """Draw (len(condition) * n, 3, H, W) pictures in [0, 1]; see `Generates`.

        Args:
            condition: class names; the empty text draws a class for each picture.
            n: pictures per condition.
            seed: base of the draw.

        Raises:
            ConfigurationError: there is no such class.
            RequestError: pictures of a condition do not pass.
        """
        parts = []
        for name in condition:
            label = None
            if name:
                names = getattr(self.model, "class_names", ())
                if name not in names:
                    raise ConfigurationError(
                        f"`condition` is '{name}', {suggest(name, ('', *names))}"
                    )
                label = names.index(name)
            parts.append(self._passing(label, n, seed, name))
        return torch.cat(parts)

    @torch.no_grad()
    def _passing(self, label: int | None, n: int, seed: int, name: str) -> Tensor:
        device = next(self.model.network.parameters()).device
        self.guide.to(device)
        found: dict[int, Tensor] = {}
        drawn, most = 0, 0
        with frozen(self.model):
            for number in range(self.tries):
                left = [row for row in range(n) if row not in found]
                if not left:
                    break
                images = self.model.pictures(self._latents(left, number, label, seed))
                seen = torch.cat([self.guide.probabilities(part) for part in images.split(256)])
                passes = (seen < self.threshold).all(dim=1).tolist()
                found |= {r: i for r, i, ok in zip(left, images, passes, strict=True) if ok}
                drawn, most = drawn + len(left), number + 1
        self.report = FilterReport(
            self.report.pictures + len(found),
            self.report.drawn + drawn,
            max(self.report.most_tries, most),
        )
        if len(found) < n:
            where = f" of the class '{name}'" if name else ""
            raise RequestError(
                f"{n - len(found)} of {n} pictures{where} do not pass within {self.tries} tries; "
                f"raise `tries` or `threshold` (now {self.threshold:g}), or leave this class out"
            )
        like = torch.empty(0, 3, *self.model.resolution, device=device)
        return torch.stack([found[row] for row in range(n)]) if n else like

    def _latents(self, rows: Sequence[int], number: int, label: int | None, seed: int) -> Latents:
        """The latents of a try; those of the first are the generator's own."""
        purpose = f"-try-{number}" if number else ""
        labels = None if label is None else torch.full((1,), label)
        return Latents.cat(
            [self.model.draw(1, seed, first=row, labels=labels, purpose=purpose) for row in rows]
        )

    def describe(self) -> dict[str, Any]:
        """What the filter is, and what it has done, as plain data."""
        return {
            "mitigation": type(self).__name__,
            "concepts": [concept.to_dict() for concept in self.concepts],
            "guide": self.guide.describe(),
            "threshold": self.threshold,
            "tries": self.tries,
            **self.report.to_dict(),
        }
