"""Which sample plays which role: resolved from requests, frozen to a file, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmforget.data.hashing import uniform
from mmforget.errors import DataError, MissingFileError, RequestError, suggest
from mmforget.request import ForgetRequest

Stage = Literal["train", "val", "test"]
Role = Literal["all", "forget", "retain", "previous", "missing"]

STAGES: tuple[Stage, ...] = ("train", "val", "test")
ROLES: tuple[Role, ...] = ("forget", "retain", "previous", "missing")


@dataclass(frozen=True)
class Labelled:
    """Ids and labels of one stage, all that a split depends on.

    Attributes:
        ids: (N,) int64, unique.
        labels: (N,) int64 class indices; (N, C) bool where a sample holds objects of several
            classes; or None.
        hash: identifies the data of the stage.
        seen: (N, C) bool: classes that can be seen in a sample. One that shows a forgotten class is
            not retained, whatever else it holds. None: what else it holds is retained.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    hash: str
    seen: np.ndarray | None = None


@dataclass(frozen=True)
class Limits:
    """How much of the training data a forgetting method is given.

    Args:
        shots: exactly this many samples per class, of forget and retain; None for no limit.
        missing_classes: retained classes of which there is no training sample. They stay in the
            retain sets of validation and test.
        retain_fraction: share of the retain set, drawn uniformly and not by class, in (0, 1].

    Raises:
        DataError: a number out of its range, or `shots` together with `retain_fraction`.
    """

    shots: int | None = None
    missing_classes: tuple[str | int, ...] = ()
    retain_fraction: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "missing_classes", tuple(self.missing_classes))
        if self.shots is not None and self.shots < 1:
            raise DataError(f"`shots` is {self.shots}, it must be at least 1 or left out")
        if not 0 < self.retain_fraction <= 1:
            raise DataError(
                f"`retain_fraction` is {self.retain_fraction}, it must be above 0 and at most 1"
            )
        if self.shots is not None and self.retain_fraction < 1:
            raise DataError(
                f"`shots` ({self.shots}) and `retain_fraction` ({self.retain_fraction}) both limit "
                "the retain set; give one of them"
            )


@dataclass(frozen=True)
class ForgetSplit:
    """The frozen roles of all samples under a sequence of requests, of which the last is current.

    Attributes:
        class_names: names by class index.
        forget_classes: forgotten by the current request; empty if it names samples.
        previous_classes: forgotten by earlier requests.
        retain_classes: the rest, missing classes included.
        missing_classes: retained classes without training samples.
        ids: sorted sample ids by ``stage/role``, such as ``train/forget``. The roles ``forget``,
            ``retain`` and ``previous`` are disjoint, except that an image which holds objects of
            several classes plays each role of which it holds an object; ``missing`` is a part of
            ``retain`` in validation and test, and is empty in training. Training roles respect the
            limits.
        shots, retain_fraction, seed: how the training roles were drawn.
        data_hash: identifies the data.
        request_hashes: the requests in order.
    """

    class_names: tuple[str, ...]
    forget_classes: tuple[int, ...]
    previous_classes: tuple[int, ...]
    retain_classes: tuple[int, ...]
    missing_classes: tuple[int, ...]
    ids: Mapping[str, tuple[int, ...]] = field(repr=False)
    shots: int | None
    retain_fraction: float
    seed: int
    data_hash: str
    request_hashes: tuple[str, ...]

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of all fields."""
        return _hash(asdict(self))

    def sizes(self) -> dict[str, int]:
        """Number of samples by ``stage/role``."""
        return {key: len(value) for key, value in self.ids.items()}

    def save(self, path: str | Path) -> None:
        """Write the split as JSON, together with its hash."""
        content = asdict(self) | {"hash": self.hash}
        Path(path).write_text(json.dumps(content, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ForgetSplit:
        """Read a split and check it against its hash.

        Raises:
            MissingFileError: there is no such file.
            DataError: the file is not a split, or was changed after it had been written.
        """
        content = read_hashed(Path(path))
        known = {item.name for item in fields(cls)}
        if set(content) != known:
            odd = sorted(set(content) ^ known)
            raise DataError(
                f"split file '{path}' lacks or adds the fields {', '.join(odd)}; "
                "write it again with this version of mmforget"
            )
        lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
        ids = {key: tuple(value) for key, value in content["ids"].items()}
        return cls(**(content | lists | {"ids": ids}))


def read_hashed(path: Path) -> dict[str, Any]:
    """Read a JSON object that carries the hash of its other fields, and remove the hash.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file is not JSON, has no hash, or does not match it.
    """
    if not path.is_file():
        raise MissingFileError(f"split file '{path}' does not exist; check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"split file '{path}' is not valid JSON ({error}); restore it from its source"
        ) from error
    if not isinstance(content, dict) or content.pop("hash", None) != _hash(content):
        raise DataError(
            f"split file '{path}' does not match its own hash: it was changed or cut off; "
            "restore it from its source"
        )
    return content


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_hashed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object together with the hash of its fields; the inverse of `read_hashed`."""
    path.write_text(json.dumps({**content, "hash": _hash(content)}, sort_keys=True) + "\n")


def class_indices(
    values: Sequence[str | int], class_names: Sequence[str], owner: str
) -> tuple[int, ...]:
    """Resolve class names and indices; ``3`` and ``"3"`` mean index 3 unless a class is named so.

    Args:
        values: names or indices.
        class_names: names by class index.
        owner: what the user wrote them in, for messages.

    Returns:
        Class indices in the given order.

    Raises:
        RequestError: a class that does not exist, or one that is named twice in two ways.
    """
    names = {name: index for index, name in enumerate(class_names)}
    found: list[int] = []
    for value in values:
        text = str(value)
        if text in names:
            index = names[text]
        elif text.isascii() and text.isdigit() and int(text) < len(class_names):
            index = int(text)
        else:
            raise RequestError(f"{owner} names class '{value}', {suggest(value, class_names)}")
        if index in found:
            raise RequestError(
                f"{owner} names class '{class_names[index]}' more than once (as '{value}'); "
                "name it once"
            )
        found.append(index)
    return tuple(found)


def make_split(
    stages: Mapping[Stage, Labelled],
    class_names: tuple[str, ...],
    requests: Sequence[ForgetRequest],
    limits: Limits,
    seed: int,
) -> ForgetSplit:
    """Validate a sequence of requests and give every sample its role.

    Args:
        stages: ids and labels of ``train``, ``val`` and ``test``.
        class_names: names by class index.
        requests: in order; the last is current, the others were forgotten before.
        limits: how much of the training data may be used.
        seed: base of the draws of `limits`.

    Raises:
        RequestError: unknown classes or samples, something forgotten twice, nothing to forget or
            nothing to retain, classes requested of data without labels.
        DataError: limits that the data cannot meet.
    """
    if not requests:
        raise RequestError("no request was given; name the classes or samples to forget")
    owners = [f"request '{request.name}'" for request in requests]
    for request, owner in zip(requests, owners, strict=True):
        if request.concepts:
            raise RequestError(
                f"{owner} names concepts, which labelled data does not have; name `classes` or "
                "`samples`, or use `mmforget erase` for a text-to-image model"
            )
        if request.classes and stages["train"].labels is None:
            raise RequestError(
                f"{owner} names classes, but the data has no labels; name `samples` by id, "
                "or say which column holds the labels"
            )
    classes = [
        class_indices(request.classes, class_names, owner)
        for request, owner in zip(requests, owners, strict=True)
    ]
    _check_twice(classes, [request.samples for request in requests], owners, class_names)
    _check_samples(stages["train"], requests, classes, owners, class_names)
    _check_objects(stages["train"], requests[-1].samples, classes, owners[-1], class_names)

    forget, previous = classes[-1], tuple(c for group in classes[:-1] for c in group)
    retained = tuple(c for c in range(len(class_names)) if c not in {*forget, *previous})
    if class_names and not retained:
        raise RequestError(
            f"{owners[-1]} leaves no class to retain: all {len(class_names)} classes are "
            "forgotten; name fewer"
        )
    missing = class_indices(limits.missing_classes, class_names, "`missing_classes`")
    for index in missing:
        if index not in retained:
            raise RequestError(
                f"class '{class_names[index]}' is in `missing_classes` and is also to be "
                "forgotten; remove it from one of the two"
            )
    if (missing or limits.shots) and stages["train"].labels is None:
        raise DataError("`shots` and `missing_classes` need labels, but the data has none")

    earlier = tuple(sample for request in requests[:-1] for sample in request.samples)
    present = tuple(index for index in retained if index not in missing)
    ids: dict[str, tuple[int, ...]] = {}
    for stage, data in stages.items():
        masks = role_masks(data, forget, requests[-1].samples, previous, earlier, missing)
        if stage == "train":
            _limit(data, masks, limits, seed, forget, present, class_names)
        for role in ROLES:
            ids[f"{stage}/{role}"] = tuple(np.sort(data.ids[masks[role]]).tolist())
    if not ids["train/forget"]:
        raise RequestError(
            f"{owners[-1]} names nothing that is in the training data: its forget set is empty; "
            "name a class that has training samples"
        )
    if not ids["train/retain"]:
        mixed = stages["train"].seen is not None
        raise RequestError(
            f"{owners[-1]} leaves no training sample to retain; forget less, or give fewer "
            f"`missing_classes`{', or set `mixed_images` to filter' if mixed else ''}"
        )
    digest = hashlib.sha256("".join(stages[stage].hash for stage in STAGES).encode())
    return ForgetSplit(
        class_names=class_names,
        forget_classes=forget,
        previous_classes=previous,
        retain_classes=retained,
        missing_classes=missing,
        ids=ids,
        shots=limits.shots,
        retain_fraction=limits.retain_fraction,
        seed=seed,
        data_hash=digest.hexdigest(),
        request_hashes=tuple(request.hash for request in requests),
    )


def role_masks(
    data: Labelled,
    forget_classes: Sequence[int],
    forget_samples: Sequence[int],
    previous_classes: Sequence[int],
    previous_samples: Sequence[int],
    missing_classes: Sequence[int],
) -> dict[Role, np.ndarray]:
    """Masks (N,) by role, before any limit; a sample forgotten earlier is never forgotten again."""
    if data.labels is not None and data.labels.ndim == 2:
        return _roles_of_scenes(
            data,
            forget_classes,
            forget_samples,
            previous_classes,
            previous_samples,
            missing_classes,
        )

    def among(classes: Sequence[int], samples: Sequence[int]) -> np.ndarray:
        chosen = np.isin(data.ids, np.asarray(samples, dtype=np.int64))
        if data.labels is not None:
            chosen |= holding(data.labels, classes)
        return chosen

    previous = among(previous_classes, previous_samples)
    forget = among(forget_classes, forget_samples) & ~previous
    retain = ~previous & ~forget
    return {
        "forget": forget,
        "retain": retain,
        "previous": previous,
        "missing": retain & among(missing_classes, ()),
    }


def _roles_of_scenes(
    data: Labelled,
    forget_classes: Sequence[int],
    forget_samples: Sequence[int],
    previous_classes: Sequence[int],
    previous_samples: Sequence[int],
    missing_classes: Sequence[int],
) -> dict[Role, np.ndarray]:
    """Masks (N,) by role of images with objects of several classes; an image may play several.

    An image without any object shows the background, which is to stay: it is retained. One that is
    named by its id is forgotten as a whole. An image with an object of a missing class is no
    training image of the retained ones, for it would show what is missing.
    """
    labels = data.labels
    assert labels is not None  # the caller has looked
    gone = np.isin(data.ids, np.asarray(previous_samples, dtype=np.int64))
    named = np.isin(data.ids, np.asarray(forget_samples, dtype=np.int64)) & ~gone
    whole = ~gone & ~named
    out = {*forget_classes, *previous_classes}
    retained = [index for index in range(labels.shape[1]) if index not in out]
    retain = (holding(labels, retained) | ~labels.any(axis=1)) & whole
    if data.seen is not None:
        retain &= ~holding(data.seen, sorted(out))
    return {
        "forget": named | (holding(labels, forget_classes) & whole),
        "retain": retain,
        "previous": gone | (holding(labels, previous_classes) & whole),
        "missing": holding(labels, missing_classes) & retain,
    }


def holding(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Mark the samples that belong to one of some classes, or hold an object of one.

    Args:
        labels: (N,) class indices, or (N, C) bool.
        classes: indices.

    Returns:
        (N,) bool.
    """
    if labels.ndim == 2:
        return np.asarray(labels[:, list(classes)].any(axis=1), dtype=bool)
    return np.isin(labels, np.asarray(list(classes), dtype=np.int64))


def _check_twice(
    classes: Sequence[Sequence[int]],
    samples: Sequence[Sequence[int]],
    owners: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Refuse what an earlier request has forgotten already."""
    seen: dict[tuple[str, int], str] = {}
    for owner, group, ids in zip(owners, classes, samples, strict=True):
        named = [("class", index) for index in group] + [("sample", index) for index in ids]
        for kind, index in named:
            if (kind, index) in seen:
                shown = f"'{class_names[index]}'" if kind == "class" else str(index)
                raise RequestError(
                    f"{owner} names {kind} {shown}, which {seen[kind, index]} has forgotten "
                    "already; remove it"
                )
        seen.update(dict.fromkeys(named, owner))


def _check_samples(
    train: Labelled,
    requests: Sequence[ForgetRequest],
    classes: Sequence[Sequence[int]],
    owners: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Refuse sample ids that are not in the training data, or whose class was forgotten before."""
    gone: dict[int, str] = {}
    for request, group, owner in zip(requests, classes, owners, strict=True):
        wanted = np.asarray(request.samples, dtype=np.int64)
        unknown = wanted[~np.isin(wanted, train.ids)]
        if unknown.size:
            raise RequestError(
                f"{owner} names {unknown.size} sample id(s) that are not in the training data "
                f"(first: {unknown[0]}); valid ids are in `datamodule.dataset('train').ids`, "
                f"{train.ids.min()} to {train.ids.max()}"
            )
        by_one_class = train.labels is not None and train.labels.ndim == 1
        if by_one_class and gone and wanted.size:
            assert train.labels is not None
            label_of = dict(zip(train.ids.tolist(), train.labels.tolist(), strict=True))
            for sample in request.samples:
                if (label := label_of[sample]) in gone:
                    raise RequestError(
                        f"{owner} names sample {sample} of class '{class_names[label]}', which "
                        f"{gone[label]} has forgotten already; remove it"
                    )
        gone.update(dict.fromkeys(group, owner))


def _check_objects(
    train: Labelled,
    samples: Sequence[int],
    classes: Sequence[Sequence[int]],
    owner: str,
    class_names: Sequence[str],
) -> None:
    """Refuse classes and images of which no training image has an object to forget."""
    labels = train.labels
    if labels is None or labels.ndim == 1:
        return
    for index in classes[-1]:
        if not labels[:, index].any():
            raise RequestError(
                f"{owner} names class '{class_names[index]}', of which no training image has a "
                "box; name a class that has some"
            )
    gone = [index for group in classes[:-1] for index in group]
    left = np.delete(labels, gone, axis=1).any(axis=1)
    named = np.isin(train.ids, np.asarray(samples, dtype=np.int64))
    if (named & ~left).any():
        sample = train.ids[named & ~left][0]
        raise RequestError(
            f"{owner} names image {sample}, which has no box that is not forgotten already; "
            "remove it"
        )


def _limit(
    data: Labelled,
    masks: dict[Role, np.ndarray],
    limits: Limits,
    seed: int,
    forget_classes: Sequence[int],
    retain_classes: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """Apply the limits to the masks of the training data, in place."""
    masks["retain"] = masks["retain"] & ~masks["missing"]
    masks["missing"] = np.zeros_like(masks["missing"])
    # Ranks of keyed numbers, not a stream of draws: the few samples of a class stay the same
    # through all requests of a sequence, as they would in a stored replay buffer.
    order = uniform(data.ids, seed, "limits")
    if limits.shots is not None:
        # A request that names samples means exactly these, so shots limit its retain set only.
        for role in ("forget", "retain") if forget_classes else ("retain",):
            wanted = forget_classes if role == "forget" else retain_classes
            masks[role] = _few(data, masks[role], order, limits.shots, class_names, wanted)
    elif limits.retain_fraction < 1:
        chosen = np.flatnonzero(masks["retain"])
        count = max(1, round(limits.retain_fraction * len(chosen)))
        kept = chosen[np.argsort(order[chosen], kind="stable")[:count]]
        masks["retain"] = np.isin(np.arange(len(data.ids)), kept)


def _few(
    data: Labelled,
    mask: np.ndarray,
    order: np.ndarray,
    shots: int,
    class_names: Sequence[str],
    wanted: Sequence[int],
) -> np.ndarray:
    """The `shots` samples of lowest order in every class that occurs in the mask.

    Of images with objects of several classes: those of lowest order that hold a `wanted` class. So
    every class has its own images, and more where they are also in those of another class.
    """
    assert data.labels is not None  # the caller has refused unlabelled data
    kept = np.zeros_like(mask)
    found = data.labels[mask]
    for index in np.unique(found) if found.ndim == 1 else wanted:
        members = np.flatnonzero(mask & holding(data.labels, [index]))
        if 0 < len(members) < shots:
            raise DataError(
                f"`shots` is {shots}, but class '{class_names[index]}' has only {len(members)} "
                f"training samples; give at most {len(members)}"
            )
        kept[members[np.argsort(order[members], kind="stable")[:shots]]] = True
    return kept


def attack_half(ids: np.ndarray, labels: np.ndarray | None, seed: int = 0) -> np.ndarray:
    """Choose T_attack, the half of the test data on which attackers may train.

    Stratified by class and fixed by a hash of the id; the rest is T_eval. A class with an odd
    number of samples has the greater part in T_eval, where attacks are scored.

    Args:
        ids: (N,) sample ids.
        labels: (N,) class indices; None treats all samples as one class.
        seed: base of the hash.

    Returns:
        (N,) bool, True for T_attack.
    """
    order = uniform(ids, seed, "attack-half")
    groups = np.zeros(len(ids), dtype=np.int64) if labels is None else np.asarray(labels)
    return lowest_share(order, groups, 0.5)


def lowest_share(order: np.ndarray, groups: np.ndarray, share: float) -> np.ndarray:
    """Mark the given share, rounded down, of every group: its members of lowest order.

    Args:
        order: (N,) sort keys.
        groups: (N,) group of each sample.
        share: in [0, 1].

    Returns:
        (N,) bool.
    """
    chosen = np.zeros(len(order), dtype=bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        count = int(share * len(members))
        chosen[members[np.argsort(order[members], kind="stable")[:count]]] = True
    return chosen
