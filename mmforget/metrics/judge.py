"""Judges: models that say what is to be seen in a generated picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torchmetrics import Metric

from mmforget.errors import ConfigurationError, DataError, MissingFileError, ModelError, suggest

if TYPE_CHECKING:
    from mmforget.models.clip import ClipModel

logger = logging.getLogger(__name__)

SHIPPED_JUDGE = "digit_world"
CLIP_SCALE = 100.0
"""Factor of the cosines before the softmax; that of the published CLIP models."""

PHOTO_TEMPLATES = ("a photo of the {}",)


@runtime_checkable
class Judge(Protocol):
    """Reads facts from pictures. It must not share weights with the model that made them."""

    @property
    def factors(self) -> Mapping[str, tuple[str, ...]]:
        """Per factor, such as ``digit``, its possible values in the order of the probabilities."""
        ...

    @property
    def accuracy(self) -> Mapping[str, float]:
        """Per factor, the share of real pictures that is read correctly; empty if unknown."""
        ...

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return per factor (B, K) probabilities for images (B, 3, H, W) in [0, 1]."""
        ...


class ClassifierJudge:
    """A classifier whose outputs are the values of several factors, one after another.

    Args:
        classifier: a model with `logits`, such as `ImageClassifier`.
        factors: per factor its values; together as many as the classifier has outputs.
        accuracy: per factor, measured on real pictures.
        batch_size: pictures at a time.

    Raises:
        ModelError: the numbers do not fit.
    """

    def __init__(
        self,
        classifier: Any,
        factors: Mapping[str, Sequence[str]],
        accuracy: Mapping[str, float] | None = None,
        batch_size: int = 256,
    ) -> None:
        self.classifier = classifier.eval()
        self.factors = {name: tuple(values) for name, values in factors.items()}
        self.accuracy = dict(accuracy or {})
        self.batch_size = batch_size
        wanted = sum(len(values) for values in self.factors.values())
        if wanted != classifier.num_classes:
            raise ModelError(
                f"the judge's factors have {wanted} values, but its classifier has "
                f"{classifier.num_classes} outputs; name every output once"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Judge`."""
        logits = torch.cat(
            [self.classifier.logits({"image": part}) for part in images.split(self.batch_size)]
        )
        parts = logits.split([len(values) for values in self.factors.values()], dim=1)
        return {name: part.softmax(1) for name, part in zip(self.factors, parts, strict=True)}


class ClipJudge:
    """Zero-shot judge: the value whose sentences lie nearest to the picture.

    The probabilities are softmax(100 cos) over the values of a factor, a closed list: a picture of
    something else gets one of them all the same.

    Args:
        model: image and text encoder, another one than the method used.
        factors: per factor its values, at least two.
        templates: per factor the sentences with ``{}`` over which the embedding of a value is
            averaged; a factor that is not named takes `PHOTO_TEMPLATES`.
        accuracy: per factor, measured on real pictures.
        scale: of the cosines.
        batch_size: pictures at a time.

    Raises:
        ConfigurationError: templates for an unknown factor, or a factor with fewer than two values.
        RequestError: a sentence is longer than the text encoder reads.

    Reference:
        Radford et al., Learning transferable visual models from natural language supervision,
        2021, arXiv 2103.00020.
    """

    def __init__(
        self,
        model: ClipModel,
        factors: Mapping[str, Sequence[str]],
        templates: Mapping[str, Sequence[str]] | None = None,
        accuracy: Mapping[str, float] | None = None,
        scale: float = CLIP_SCALE,
        batch_size: int = 256,
    ) -> None:
        self.model = model.eval()
        self.factors = {name: tuple(values) for name, values in factors.items()}
        given = templates or {}
        for name in given:
            if name not in self.factors:
                raise ConfigurationError(
                    f"`templates` names the factor '{name}', {suggest(name, self.factors)}"
                )
        self.templates = {name: tuple(given.get(name, PHOTO_TEMPLATES)) for name in self.factors}
        self.accuracy = dict(accuracy or {})
        self.scale, self.batch_size = scale, batch_size
        self._texts: dict[str, Tensor] = {}
        for name, values in self.factors.items():
            if len(set(values)) != len(values) or len(values) < 2:
                raise ConfigurationError(
                    f"the factor '{name}' has the values {', '.join(values) or '(none)'}; a "
                    "zero-shot judge needs at least two different ones"
                )
            with torch.no_grad():
                self._texts[name] = model.class_embeddings(values, self.templates[name])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See `Judge`."""
        found = torch.cat([self.model.encode_images(p) for p in images.split(self.batch_size)])
        return {
            name: (self.scale * found @ texts.to(found).T).softmax(1)
            for name, texts in self._texts.items()
        }


def value_index(judge: Judge, factor: str, value: str) -> int:
    """Place of a value among those of a factor.

    Raises:
        ConfigurationError: the judge has no such factor, or the factor no such value.
    """
    if factor not in judge.factors:
        raise ConfigurationError(
            f"the judge has no factor '{factor}', {suggest(factor, judge.factors)}"
        )
    values = judge.factors[factor]
    if value not in values:
        raise ConfigurationError(
            f"the factor '{factor}' of the judge has no value '{value}', {suggest(value, values)}"
        )
    return values.index(value)


class Count(NamedTuple):
    """How many of n pictures were judged as wanted."""

    hits: int
    n: int


class ConceptRates(Metric):
    """Counts what a judge sees in pictures of which something was wanted, per group of prompts.

    The erasure rate of a target is 1 - hits / n for its own prompts; the specificity of another
    concept is hits / n for the prompts of that one. Counts are kept, not rates, so that intervals
    can be made of them.

    Pictures that are black throughout are left out, since safety checkers return them and they
    would count as erased; `left_out` says how many, and `compute` warns. Collapsed models that
    paint other constant pictures are not spared; see `mmforget.metrics.vacuous`.

    Args:
        judge: reads the pictures.
        factor: which of its factors counts.
        groups: names of groups of prompts, such as target, synonyms, other templates.

    Raises:
        ConfigurationError: an unknown factor, or groups that are none or not distinct.
    """

    full_state_update = False
    higher_is_better = None
    table: Tensor
    black: Tensor

    def __init__(
        self, judge: Judge, factor: str, groups: Sequence[str] = ("all",), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if factor not in judge.factors:
            raise ConfigurationError(
                f"the judge has no factor '{factor}', {suggest(factor, judge.factors)}"
            )
        if isinstance(groups, str) or not groups or len(set(groups)) != len(groups):
            raise ConfigurationError(f"`groups` is {groups!r}; give distinct names in a list")
        self.judge, self.factor, self.groups = judge, factor, tuple(groups)
        self.values = judge.factors[factor]
        size = len(self.values)
        counts = torch.zeros(len(self.groups), size, size, dtype=torch.int64)
        self.add_state("table", counts, dist_reduce_fx="sum")
        self.add_state("black", counts[:, :, 0].clone(), dist_reduce_fx="sum")

    def update(
        self, images: Tensor, wanted: Tensor | Sequence[str] | str, group: str | None = None
    ) -> None:
        """Judge pictures.

        Args:
            images: (B, 3, H, W) in [0, 1].
            wanted: (B,) indices of the wanted values, their names, or one name for all.
            group: to which the prompts belong; may be left out if there is only one.

        Raises:
            ConfigurationError: an unknown group or value.
            DataError: as many wanted values as pictures are needed.
        """
        row = self._group(group)
        index = self._wanted(wanted, len(images))
        if not len(images):
            return
        black = (images == 0).flatten(1).all(dim=1).cpu()
        judged = self.judge(images)[self.factor].argmax(1).cpu()
        size = len(self.values)
        pairs = (index * size + judged)[~black]
        self.table[row] += pairs.bincount(minlength=size**2).view(size, size).to(self.table.device)
        self.black[row] += index[black].bincount(minlength=size).to(self.black.device)

    def compute(self) -> dict[str, Tensor]:
        """Return per group the (K, K) counts, wanted values in rows and judged ones in columns.

        Raises:
            DataError: no picture was judged.
        """
        left_out = int(self.black.sum())
        if not self.table.sum():
            raise DataError(
                f"no picture was judged ({left_out} black ones were left out); update with "
                "pictures before `compute`"
            )
        if left_out:
            logger.warning(
                "%d pictures are black throughout and were left out, a safety checker may have "
                "replaced them",
                left_out,
            )
        return {group: self.table[row] for row, group in enumerate(self.groups)}

    def counts(self, value: str, group: str | None = None) -> Count:
        """Return hits and n for the prompts of one value; n is 0 where nothing was measured.

        Raises:
            ConfigurationError: an unknown group or value.
        """
        table = self.compute()[self.groups[self._group(group)]]
        row = value_index(self.judge, self.factor, value)
        return Count(int(table[row, row]), int(table[row].sum()))

    def left_out(self, group: str | None = None) -> int:
        """Number of black pictures of this process that were not counted."""
        return int(self.black[self._group(group)].sum())

    def _group(self, name: str | None) -> int:
        if name is None and len(self.groups) == 1:
            return 0
        if name not in self.groups:
            raise ConfigurationError(f"`group` is '{name}', {suggest(name, self.groups)}")
        return self.groups.index(name)

    def _wanted(self, wanted: Tensor | Sequence[str] | str, count: int) -> Tensor:
        if isinstance(wanted, str):
            wanted = [wanted] * count
        if isinstance(wanted, Tensor):
            index = wanted.cpu().long()
        else:
            places = [value_index(self.judge, self.factor, name) for name in wanted]
            index = torch.tensor(places, dtype=torch.int64)
        if index.shape != (count,):
            raise DataError(
                f"there are {count} pictures and wanted values of shape {tuple(index.shape)}; give "
                "one for each picture"
            )
        if count and not 0 <= int(index.min()) <= int(index.max()) < len(self.values):
            raise DataError(
                f"wanted values run from {int(index.min())} to {int(index.max())}, the factor "
                f"'{self.factor}' has indices 0 to {len(self.values) - 1}"
            )
        return index


def load_judge(source: str | Path = SHIPPED_JUDGE) -> ClassifierJudge:
    """Load a classifier folder whose ``training.json`` names factors and accuracies.

    Args:
        source: the folder, or ``digit_world`` for the judge that is shipped.

    Raises:
        MissingFileError: there is no such folder.
    """
    from mmforget.models.classifier import load_classifier

    if source == SHIPPED_JUDGE:
        source = Path(str(resources.files("mmforget") / "assets" / "digit_world" / "judge"))
    file = Path(source) / "training.json"
    if not file.is_file():
        raise MissingFileError(
            f"the judge '{source}' has no training.json with its `factors`; give such a folder "
            f"or '{SHIPPED_JUDGE}'"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    return ClassifierJudge(
        load_classifier(Path(source)), record["factors"], record.get("test_accuracy")
    )
