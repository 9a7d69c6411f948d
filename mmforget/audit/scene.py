"""The data of an audit by role, and the cached outputs of every model on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from mmforget.attacks.relearning import RelearningSettings
from mmforget.audit.outputs import Outputs, collect_all
from mmforget.audit.results import ModelEntry, Role
from mmforget.data.base import ForgetDataModule, ImageDataset
from mmforget.data.split import STAGES, Stage, attack_half
from mmforget.errors import ConfigurationError
from mmforget.models.base import Model, state_hash
from mmforget.request import ForgetRequest
from mmforget.seeds import generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditedModel:
    """A model and what is known about it."""

    entry: ModelEntry
    model: Model


@dataclass(frozen=True)
class AuditSettings:
    """How an audit is done.

    Args:
        seed: base seed of all draws.
        batch_size: of forward passes.
        train_samples: at most this many forgotten and as many retained training samples are
            evaluated, drawn at random; None takes all. Test samples are evaluated completely.
        random_inits: networks with fresh weights that the zero-retrain score is averaged over.
        replicates: of every bootstrap.
        max_retain_drop: loss of accuracy on retained test data that is accepted, in [0, 1].
        cka_batch_size: of the minibatch CKA.
        neighbours: of the k-NN classifier.
        examples: pictures of each kind in the report; 0 shows none, which a report on people needs.
        relearning: budget of the relearning attack.
        tuning: how hyper-parameters were chosen and how many settings were tried, for the report.

    Raises:
        ConfigurationError: a number out of range.
    """

    seed: int = 0
    batch_size: int = 256
    train_samples: int | None = 1000
    random_inits: int = 3
    replicates: int = 1000
    max_retain_drop: float = 0.01
    cka_batch_size: int = 256
    neighbours: int = 5
    examples: int = 6
    relearning: RelearningSettings = field(default_factory=RelearningSettings)
    tuning: str = ""

    def __post_init__(self) -> None:
        smallest = {
            "batch_size": 1,
            "random_inits": 1,
            "replicates": 100,
            "cka_batch_size": 5,
            "neighbours": 1,
            "examples": 0,
            "max_retain_drop": 0,
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"`audit.{name}` is {getattr(self, name)}, it must be at least {least}"
                )
        if self.train_samples is not None and self.train_samples < 1:
            raise ConfigurationError(
                f"`audit.train_samples` is {self.train_samples}, it must be at least 1, or null "
                "for all"
            )


class Scene:
    """Everything that the metrics of one audit are functions of.

    Splits by name, each a set of ids: ``train_forget``, ``train_previous``, ``train_retain``
    (random parts, see `AuditSettings`), ``test_forget``, ``test_retain``, ``test_previous``,
    ``test_missing`` and ``test_missing_<class>``. ``train_forgotten`` and ``test_forgotten`` are
    all that the models were asked to forget, by the current and by earlier requests.

    Attributes:
        ids: (N,) sorted sample ids of every split.
        all_forgotten: ids of all forgotten training samples, evaluated or not.
        drawn: by split the number of samples of which only a part is evaluated.
        twin: by model the first model with the same weights, which is evaluated in its place.

    Args:
        models: unique names, exactly one original.
        data: whose requests are set here.
        requests: in order.
        settings: see there.
    """

    def __init__(
        self,
        models: Sequence[AuditedModel],
        data: ForgetDataModule,
        requests: Sequence[ForgetRequest],
        settings: AuditSettings,
    ) -> None:
        self.models, self.data, self.settings = list(models), data, settings
        self.requests = list(requests)
        self.split = data.request(*requests)
        self.goal = requests[-1].goal
        self.class_names = self.split.class_names
        self.forgotten_classes = tuple(
            sorted((*self.split.previous_classes, *self.split.forget_classes))
        )
        self.drawn: dict[str, int] = {}
        self.ids = self._ids()
        first: dict[tuple[type, str], str] = {}
        self.twin = {
            audited.entry.name: first.setdefault(
                (type(audited.model), state_hash(audited.model)), audited.entry.name
            )
            for audited in self.models
        }
        test = data.dataset("test")
        half = attack_half(test.ids, test.labels, settings.seed)
        self.attack_ids, self.eval_ids = test.ids[half], test.ids[~half]
        self._outputs: dict[tuple[str, Stage], Outputs] = {}

    # ---- roles ------------------------------------------------------------------------------

    def _ids(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for stage in ("train", "test"):
            for role in ("forget", "retain", "previous"):
                found[f"{stage}_{role}"] = self.data.subset(stage, role, whole=True).ids
            both = (found[f"{stage}_forget"], found[f"{stage}_previous"])
            found[f"{stage}_forgotten"] = np.sort(np.concatenate(both))
        self.all_forgotten = found["train_forgotten"]
        found["test_missing"] = self.data.subset("test", "missing", whole=True).ids
        test = self.data.dataset("test")
        for index in self.split.missing_classes:
            assert test.labels is not None  # missing classes need labels
            found[f"test_missing_{self.class_names[index]}"] = test.ids[test.labels == index]
        found = {name: np.sort(ids) for name, ids in found.items()}
        limit = self.settings.train_samples
        for name in ("train_retain", "train_forgotten"):
            if limit is not None and len(found[name]) > limit:
                self.drawn[name] = len(found[name])
                chosen = draw(len(found[name]), limit, self.settings.seed, name)
                found[name] = found[name][chosen]
        for name in ("train_forget", "train_previous"):
            found[name] = np.intersect1d(found[name], found["train_forgotten"])
        return found

    def has(self, split: str) -> bool:
        """Whether a split has samples."""
        return split in self.ids and len(self.ids[split]) > 0

    def seen(self, name: str) -> str:
        """``test_<name>``, or ``train_<name>`` where the request leaves no test data of it."""
        return f"test_{name}" if self.has(f"test_{name}") else f"train_{name}"

    @property
    def by_class(self) -> bool:
        """Whether whole classes were forgotten, so that unseen samples of them exist."""
        return bool(self.forgotten_classes)

    # ---- models -----------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all models, in order."""
        return [audited.entry.name for audited in self.models]

    @property
    def distinct(self) -> list[AuditedModel]:
        """The models without those that have the weights of an earlier one (see `twin`)."""
        return [
            audited
            for audited in self.models
            if self.twin[audited.entry.name] == audited.entry.name
        ]

    def by_role(self, role: Role) -> list[AuditedModel]:
        """The models that play a role, in order."""
        return [audited for audited in self.models if audited.entry.role == role]

    @cached_property
    def original(self) -> str:
        """Name of the original model."""
        return self.by_role("original")[0].entry.name

    @cached_property
    def retrained(self) -> list[str]:
        """Names of the retrained models, without those that were held out."""
        return [audited.entry.name for audited in self.by_role("retrained")]

    def references(self, model: str) -> list[str]:
        """The retrained models that a model is compared with: all but itself."""
        return [name for name in self.retrained if name != model]

    # ---- outputs ----------------------------------------------------------------------------

    def dataset(self, stage: Stage) -> ImageDataset:
        """The samples of a stage that are evaluated, by id: no result depends on their order."""
        data = self.data.dataset(stage)
        order = np.argsort(data.ids)
        if stage == "train":
            wanted = np.concatenate([self.ids["train_forgotten"], self.ids["train_retain"]])
            order = order[np.isin(data.ids[order], wanted)]
        return data.subset(order)

    def run(self) -> None:
        """Evaluate all models on all stages, once, decoding every image once."""
        models = {audited.entry.name: audited.model for audited in self.distinct}
        for stage in STAGES:
            if stage == "val" and not self.by_class:
                continue
            logger.info("evaluating %d models on %s", len(models), stage)
            found = collect_all(
                list(models.values()), self.dataset(stage), self.settings.batch_size
            )
            for name, outputs in zip(models, found, strict=True):
                self._outputs[name, stage] = outputs

    def outputs(self, model: str, split: str) -> Outputs:
        """Outputs of a model on a split, or on a whole stage (``train``, ``val``, ``test``)."""
        stage = next(stage for stage in STAGES if split.startswith(stage))
        found = self._outputs[self.twin[model], stage]
        return found if split == stage else found.of(self.ids[split])

    def features(self, model: str, split: str) -> torch.Tensor:
        """Features of a model on a split.

        Raises:
            ValueError: the model does not show its features.
        """
        features = self.outputs(model, split).features
        if features is None:
            raise ValueError(f"'{model}' offers no features (HasFeatures)")
        return features


def draw(n: int, count: int, seed: int, purpose: str) -> np.ndarray:
    """Positions of at most `count` of n samples, drawn at random, in order."""
    return np.sort(torch.randperm(n, generator=generator(seed, purpose))[:count].numpy())
