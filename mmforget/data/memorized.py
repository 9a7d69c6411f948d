"""Memorized pictures and the prompts that bring them back: what is asked for, and what to compare.

Which prompt brings back which picture is a relation, not a list: several prompts may lead to one
picture, and one prompt to several.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec, normalised
from mmforget.errors import DataError, RequestError, suggest
from mmforget.request import ForgetRequest
from mmforget.seeds import generator

MemoryKind = Literal["verbatim", "template", "unknown"]
"""``verbatim``: every seed gives the training picture; ``template``: a part or the layout is
copied and the rest varies. They are reported apart."""


@dataclass(frozen=True)
class MemorizedPrompt:
    """A prompt that brings a training picture back.

    Args:
        prompt: the text.
        images: names of the pictures; empty if they cannot be had.
        kind: see `MemoryKind`.

    Raises:
        RequestError: an empty prompt, or an unknown kind.
    """

    prompt: str
    images: tuple[str, ...] = ()
    kind: MemoryKind = "unknown"

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        if not isinstance(self.prompt, str) or not normalised(self.prompt):
            raise RequestError(
                f"`memorized.prompt` is {self.prompt!r}; give the text that brings a picture back "
                "(the empty prompt is what it is compared with)"
            )
        if self.kind not in get_args(MemoryKind):
            raise RequestError(
                f"`memorized.kind` is '{self.kind}', {suggest(self.kind, get_args(MemoryKind))}"
            )


@dataclass(frozen=True)
class Captioned:
    """Prompts that are not memorized, with real pictures where there are any.

    Args:
        prompts: N texts.
        images: (N, 3, H, W) float in [0, 1], or None.

    Raises:
        DataError: lists of unequal length.
    """

    prompts: tuple[str, ...] = ()
    images: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.images is not None and len(self.images) != len(self.prompts):
            raise DataError(
                f"there are {len(self.prompts)} captions but {len(self.images)} pictures; give one "
                "caption per picture"
            )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)


@dataclass(frozen=True)
class Coverage:
    """What of a list could be had.

    Attributes:
        listed: prompts in the list.
        usable: those with at least one picture.
        missing: names of pictures that are missing or cannot be read.
        duplicates: prompts that came more than once and were joined.
    """

    listed: int
    usable: int
    missing: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people."""
        text = f"{self.usable} of {self.listed} prompts have a picture"
        if self.missing:
            text += f", {len(self.missing)} pictures missing"
        if self.duplicates:
            text += f", {len(self.duplicates)} duplicates joined"
        return text


@dataclass(frozen=True)
class MemorizedSet:
    """Everything that is known about the memories of one model.

    Args:
        prompts: what brings pictures back; no text twice (compared without case and spaces).
        images: per name a training picture (3, H, W), float in [0, 1].
        regions: per name a (H, W) bool mask of the part that is copied; only for templates.
        retain: prompts, and pictures, that are not memorized and may be used for repair.
        test: the same, for measurements only.
        controls: (K, 3, H, W) pictures like the memorized ones that were never trained on.
        source: where it comes from.
        coverage: what of the list could be had; derived if None.

    Raises:
        RequestError: no prompts, a duplicate, or a prompt that is also in `retain` or `test`.
        DataError: a picture that a prompt names but `images` has not, or of a wrong shape.
    """

    prompts: tuple[MemorizedPrompt, ...]
    images: Mapping[str, Tensor] = field(default_factory=dict)
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    retain: Captioned = field(default_factory=Captioned)
    test: Captioned = field(default_factory=Captioned)
    controls: Tensor | None = None
    source: str = ""
    coverage: Coverage | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts:
            raise RequestError(
                "there are no memorized prompts; give at least one, or look for them with "
                "`mmforget memorization find`"
            )
        seen: dict[str, str] = {}
        for one in self.prompts:
            plain = normalised(one.prompt)
            if plain in seen:
                raise RequestError(
                    f"`memorized` has '{one.prompt}' twice; give one entry with all its pictures"
                )
            seen[plain] = one.prompt
            for name in one.images:
                if name not in self.images:
                    raise DataError(f"the prompt '{one.prompt}' names the picture '{name}', which "
                                    "is not there; add it or leave the name out")  # fmt: skip
        for what, others in (("retain", self.retain), ("test", self.test)):
            for prompt in others.prompts:
                if normalised(prompt) in seen:
                    raise RequestError(
                        f"'{prompt}' is memorized and also in `{what}`, whose prompts must not be; "
                        "remove it from one of them"
                    )
        for name, image in self.images.items():
            _check_picture(name, image, self.regions.get(name))
        if self.coverage is None:
            usable = sum(bool(one.images) for one in self.prompts)
            object.__setattr__(self, "coverage", Coverage(len(self.prompts), usable))

    def __len__(self) -> int:
        """Number of memorized prompts."""
        return len(self.prompts)

    def __iter__(self) -> Iterator[MemorizedPrompt]:
        """Iterate over the memorized prompts."""
        return iter(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The memorized prompts as texts."""
        return [one.prompt for one in self.prompts]

    @property
    def kinds(self) -> tuple[MemoryKind, ...]:
        """The kinds that occur, in a fixed order."""
        return tuple(
            kind for kind in get_args(MemoryKind) if any(p.kind == kind for p in self.prompts)
        )

    def only(self, rows: Sequence[int]) -> MemorizedSet:
        """Some of the prompts, with their pictures; everything else stays."""
        prompts = tuple(self.prompts[row] for row in rows)
        names = {name for one in prompts for name in one.images}
        return replace(
            self,
            prompts=prompts,
            images={name: image for name, image in self.images.items() if name in names},
            regions={name: part for name, part in self.regions.items() if name in names},
            coverage=None,
        )

    def of_kind(self, *kinds: MemoryKind) -> MemorizedSet:
        """The prompts of some kinds.

        Raises:
            RequestError: there are none.
        """
        return self.only([row for row, one in enumerate(self.prompts) if one.kind in kinds])

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[MemorizedSet, MemorizedSet | None]:
        """Prompts that a method may read, and held-out ones, drawn within each kind.

        Prompts that share a picture stay together.

        Args:
            share: of the prompts that go to the first part, above 0 and at most 1.
            seed: of the draw.

        Returns:
            The located part, and the held-out one, None if nothing is left for it.

        Raises:
            RequestError: a share out of range.
        """
        if not 0 < share <= 1:
            raise RequestError(f"`share` is {share}, it must be above 0 and at most 1")
        first: list[int] = []
        groups = self._groups()
        for kind in self.kinds:
            own = [group for group in groups if self.prompts[group[0]].kind == kind]
            order = torch.randperm(len(own), generator=generator(seed, "split", kind)).tolist()
            wanted = max(1, round(share * sum(map(len, own)))) if own else 0
            taken: list[int] = []
            for number in order:
                if len(taken) < wanted:
                    taken += own[number]
            first += taken
        rest = [row for row in range(len(self.prompts)) if row not in set(first)]
        return self.only(sorted(first)), self.only(rest) if rest else None

    def _groups(self) -> list[list[int]]:
        """Rows that are connected by pictures; the kind of the first stands for all of them."""
        groups: list[list[int]] = []
        for row, one in enumerate(self.prompts):
            own = set(one.images)
            near = [g for g in groups if own & {n for r in g for n in self.prompts[r].images}]
            groups = [g for g in groups if g not in near]
            groups.append(sorted([row, *(r for g in near for r in g)]))
        return sorted(groups)

    @property
    def request(self) -> ForgetRequest:
        """The erasure request that this set amounts to."""
        specs = tuple(ConceptSpec(one.prompt, kind="memorized") for one in self.prompts)
        count = len(specs)
        name = f"forget-{count}-memorized-prompt{'s' if count > 1 else ''}"
        return ForgetRequest(concepts=specs, name=name)

    @property
    def hash(self) -> str:
        """SHA-256 over prompts, kinds, relation and pictures."""
        digest = hashlib.sha256()
        rows: list[Any] = [[one.prompt, list(one.images), one.kind] for one in self.prompts]
        digest.update(json.dumps(rows).encode())
        for name, image in sorted(self.images.items()):
            levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
            digest.update(name.encode() + levels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _check_picture(name: str, image: Tensor, region: Tensor | None) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise DataError(
            f"the picture '{name}' is {tuple(image.shape)} {image.dtype}; it must be (3, H, W) "
            "float in [0, 1]"
        )
    if region is not None and (
        region.dtype != torch.bool or region.shape != image.shape[1:] or not region.any()
    ):
        raise DataError(
            f"the region of '{name}' is {tuple(region.shape)} {region.dtype}; it must be "
            f"{tuple(image.shape[1:])} bool with something in it"
        )
