from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmforget.data.split import ForgetSplit, Labelled, Limits, Stage, attack_half, make_split
from mmforget.errors import DataError, MissingFileError, RequestError
from mmforget.request import ForgetRequest

NAMES = ("cat", "dog", "owl", "elk")


def stages(sizes: tuple[int, ...] = (30, 20, 25, 10)) -> dict[Stage, Labelled]:
    """Train, val and test with ids that are no positions, and classes of unequal size."""
    found: dict[Stage, Labelled] = {}
    for number, stage in enumerate(("train", "val", "test")):
        labels = np.repeat(np.arange(len(sizes)), sizes)
        shuffled = np.random.default_rng(number).permutation(len(labels))
        found[stage] = Labelled(1000 * number + 7 * shuffled, labels, f"hash-{number}")
    return found


def split(*requests: ForgetRequest, limits: Limits | None = None, seed: int = 0) -> ForgetSplit:
    return make_split(stages(), NAMES, requests, limits or Limits(), seed)


def label_counts(ids: tuple[int, ...]) -> dict[int, int]:
    train = stages()["train"]
    labels = train.labels[np.isin(train.ids, ids)]
    return dict(
        zip(*(array.tolist() for array in np.unique(labels, return_counts=True)), strict=True)
    )


def test_roles_of_a_sequence_cover_everything_and_are_disjoint() -> None:
    result = split(ForgetRequest(classes=("dog",)), ForgetRequest(classes=("elk", 0)))
    assert result.forget_classes == (3, 0)
    assert result.previous_classes == (1,)
    assert result.retain_classes == (2,)
    for stage, data in stages().items():
        parts = [result.ids[f"{stage}/{role}"] for role in ("forget", "retain", "previous")]
        assert sorted(sum(parts, ())) == sorted(data.ids.tolist())
    assert label_counts(result.ids["train/forget"]) == {0: 30, 3: 10}
    assert label_counts(result.ids["train/previous"]) == {1: 20}
    assert result.sizes()["test/retain"] == 25


def test_sample_requests_have_no_forget_set_outside_of_training() -> None:
    chosen = tuple(stages()["train"].ids[[0, 40, 80]].tolist())
    result = split(ForgetRequest(samples=chosen))
    assert result.ids["train/forget"] == tuple(sorted(chosen))
    assert result.sizes()["val/forget"] == result.sizes()["test/forget"] == 0
    assert result.retain_classes == (0, 1, 2, 3)


def test_a_class_request_does_not_touch_samples_that_were_forgotten_before() -> None:
    train = stages()["train"]
    sample = int(train.ids[train.labels == 0][0])
    result = split(ForgetRequest(samples=(sample,)), ForgetRequest(classes=("cat",)))
    assert result.ids["train/previous"] == (sample,)
    assert result.sizes()["train/forget"] == 29


def test_names_win_over_indices_and_text_numbers_are_indices() -> None:
    names = ("2", "zero", "x")
    data = {stage: Labelled(d.ids[:75], d.labels[:75], d.hash) for stage, d in stages().items()}

    def forgotten(value: str | int) -> tuple[int, ...]:
        return make_split(
            data, names, [ForgetRequest(classes=(value,))], Limits(), 0
        ).forget_classes

    assert forgotten("2") == (0,)
    assert forgotten("1") == (1,)
    assert forgotten(1) == (1,)
    assert forgotten("x") == (2,)


@pytest.mark.parametrize(
    ("requests", "limits", "error", "words"),
    [
        ([("dg",)], {}, RequestError, ["'dg'", "did you mean 'dog'?"]),
        ([(4,)], {}, RequestError, ["'4'", "'cat'"]),
        ([("-1",)], {}, RequestError, ["'-1'"]),
        ([("cat", 0)], {}, RequestError, ["'cat' more than once"]),
        ([("cat", "dog", "owl", "elk")], {}, RequestError, ["no class to retain", "4 classes"]),
        ([("cat", "dog"), ("owl", "elk")], {}, RequestError, ["no class to retain"]),
        (
            [("cat",), ("dog", 0)],
            {},
            RequestError,
            ["'forget-dog-0' names class 'cat'", "'forget-cat' has forgotten already"],
        ),
        ([("cat",)], {"missing_classes": ("bird",)}, RequestError, ["`missing_classes`", "'bird'"]),
        ([("cat",)], {"missing_classes": (0,)}, RequestError, ["'cat'", "`missing_classes`"]),
        (
            [("elk",), ("cat",)],
            {"missing_classes": ("elk",)},
            RequestError,
            ["'elk'", "`missing_classes`"],
        ),
        (
            [("cat",)],
            {"missing_classes": ("dog", "owl", "elk")},
            RequestError,
            ["no training sample to retain"],
        ),
        ([("cat",)], {"shots": 11}, DataError, ["`shots` is 11", "'elk' has only 10"]),
        ([("elk",)], {"shots": 11}, DataError, ["`shots` is 11", "'elk' has only 10"]),
    ],
)
def test_bad_class_requests_are_refused(
    requests: list[tuple[str | int, ...]],
    limits: dict[str, object],
    error: type[Exception],
    words: list[str],
) -> None:
    with pytest.raises(error) as caught:
        split(*(ForgetRequest(classes=r) for r in requests), limits=Limits(**limits))
    for word in words:
        assert word in str(caught.value)


def test_missing_class_does_not_limit_the_shots() -> None:
    result = split(
        ForgetRequest(classes=("cat",)), limits=Limits(shots=11, missing_classes=("elk",))
    )
    assert label_counts(result.ids["train/retain"]) == {1: 11, 2: 11}


def test_unknown_and_doubly_forgotten_samples_are_refused() -> None:
    train = stages()["train"]
    sample = int(train.ids[train.labels == 1][0])
    with pytest.raises(RequestError, match=r"not in the training data \(first: 1\)"):
        split(ForgetRequest(samples=(sample, 1)))
    with pytest.raises(RequestError, match=f"not in the training data .first: {10**6}"):
        split(ForgetRequest(samples=(10**6,)), ForgetRequest(classes=("cat",)))
    with pytest.raises(RequestError, match=f"names sample {sample}, which request 'first' has"):
        split(ForgetRequest(samples=(sample,), name="first"), ForgetRequest(samples=(sample,)))
    with pytest.raises(RequestError, match=f"sample {sample} of class 'dog', which request 'all'"):
        split(ForgetRequest(classes=("dog",), name="all"), ForgetRequest(samples=(sample,)))


def test_class_without_training_samples_left_is_an_empty_forget_set() -> None:
    data = stages((5, 5, 5, 0))
    with pytest.raises(RequestError, match="forget set is empty"):
        make_split(data, NAMES, [ForgetRequest(classes=("elk",))], Limits(), 0)
    gone = tuple(data["train"].ids[data["train"].labels == 0].tolist())
    requests = [ForgetRequest(samples=gone), ForgetRequest(classes=("cat",))]
    with pytest.raises(RequestError, match="forget set is empty"):
        make_split(data, NAMES, requests, Limits(), 0)


def test_all_samples_forgotten_leaves_nothing_to_retain() -> None:
    with pytest.raises(RequestError, match="no training sample to retain"):
        split(ForgetRequest(samples=tuple(stages()["train"].ids.tolist())))


def test_no_request_is_refused() -> None:
    with pytest.raises(RequestError, match="no request"):
        split()


def test_unlabelled_data_takes_sample_requests_only() -> None:
    data = {stage: Labelled(d.ids, None, d.hash) for stage, d in stages().items()}
    sample = int(data["train"].ids[3])
    result = make_split(data, (), [ForgetRequest(samples=(sample,))], Limits(), 0)
    assert result.sizes()["train/retain"] == 84
    with pytest.raises(RequestError, match="has no labels"):
        make_split(data, (), [ForgetRequest(classes=(0,))], Limits(), 0)
    with pytest.raises(DataError, match=r"`shots`.*need labels"):
        make_split(data, (), [ForgetRequest(samples=(sample,))], Limits(shots=1), 0)


def test_shots_take_exactly_k_of_every_class_and_leave_evaluation_alone() -> None:
    result = split(ForgetRequest(classes=("cat",)), limits=Limits(shots=4))
    assert label_counts(result.ids["train/forget"]) == {0: 4}
    assert label_counts(result.ids["train/retain"]) == {1: 4, 2: 4, 3: 4}
    assert result.sizes()["test/forget"] == 30


def test_shots_stay_the_same_through_a_sequence_and_differ_by_seed() -> None:
    first = split(ForgetRequest(classes=("cat",)), limits=Limits(shots=4))
    requests = (ForgetRequest(classes=("cat",)), ForgetRequest(classes=("dog",)))
    second = split(*requests, limits=Limits(shots=4))
    assert {*second.ids["train/forget"], *second.ids["train/retain"]} == set(
        first.ids["train/retain"]
    )
    other = split(ForgetRequest(classes=("cat",)), limits=Limits(shots=4), seed=1)
    assert other.ids["train/retain"] != first.ids["train/retain"]


def test_shots_do_not_limit_a_sample_request() -> None:
    chosen = tuple(stages()["train"].ids[:9].tolist())
    result = split(ForgetRequest(samples=chosen), limits=Limits(shots=2))
    assert result.sizes()["train/forget"] == 9
    assert result.sizes()["train/retain"] == 8


def test_retain_fraction_is_uniform_and_not_stratified() -> None:
    request = ForgetRequest(classes=("cat",))
    results = [split(request, limits=Limits(retain_fraction=0.2), seed=s) for s in range(200)]
    assert {result.sizes()["train/retain"] for result in results} == {11}
    assert {result.sizes()["train/forget"] for result in results} == {30}
    counts = np.array(
        [[label_counts(r.ids["train/retain"]).get(c, 0) for c in (1, 2, 3)] for r in results]
    )
    assert np.allclose(counts.mean(0), [4, 5, 2], atol=0.4)
    assert (counts.std(0) > 0.8).all()  # a stratified draw would have no spread


def test_missing_classes_are_gone_in_training_and_retained_in_evaluation() -> None:
    result = split(ForgetRequest(classes=("cat",)), limits=Limits(missing_classes=("owl", "3")))
    assert result.missing_classes == (2, 3)
    assert label_counts(result.ids["train/retain"]) == {1: 20}
    assert result.sizes()["train/missing"] == 0
    assert result.sizes()["test/missing"] == 35
    assert set(result.ids["test/missing"]) < set(result.ids["test/retain"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shots": 0}, "`shots` is 0"),
        ({"retain_fraction": 0.0}, "`retain_fraction` is 0.0"),
        ({"retain_fraction": 1.5}, "`retain_fraction` is 1.5"),
        ({"shots": 2, "retain_fraction": 0.5}, "give one of them"),
    ],
)
def test_limits_out_of_range_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Limits(**values)


def test_saved_split_comes_back_equal_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    result = split(ForgetRequest(classes=("cat",)), limits=Limits(shots=4))
    path = tmp_path / "split.json"
    result.save(path)
    loaded = ForgetSplit.load(path)
    assert loaded == result
    assert loaded.hash == result.hash

    content = json.loads(path.read_text())
    content["ids"]["train/forget"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not match its own hash"):
        ForgetSplit.load(path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match="not valid JSON"):
        ForgetSplit.load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="does not match its own hash"):
        ForgetSplit.load(path)
    with pytest.raises(MissingFileError, match="does not exist"):
        ForgetSplit.load(tmp_path / "none.json")


def test_hash_depends_on_requests_data_and_seed() -> None:
    request = ForgetRequest(classes=("cat",))
    changed = stages()
    changed["test"] = Labelled(changed["test"].ids, changed["test"].labels, "other pixels")
    hashes = {
        split(request).hash,
        split(request, seed=1).hash,
        split(ForgetRequest(classes=("dog",))).hash,
        make_split(changed, NAMES, [request], Limits(), 0).hash,
    }
    assert len(hashes) == 4
    assert split(request).hash == split(request).hash


def test_attack_half_is_stratified_and_does_not_depend_on_order_or_other_samples() -> None:
    test = stages()["test"]
    mask = attack_half(test.ids, test.labels, 0)
    assert [int(mask[test.labels == c].sum()) for c in range(4)] == [15, 10, 12, 5]
    order = np.random.default_rng(0).permutation(len(mask))
    assert (attack_half(test.ids[order], test.labels[order], 0) == mask[order]).all()
    dogs = test.labels == 1
    assert (attack_half(test.ids[dogs], test.labels[dogs], 0) == mask[dogs]).all()
    assert (attack_half(test.ids, test.labels, 1) != mask).any()
    assert attack_half(test.ids, None, 0).sum() == len(test.ids) // 2


# ---- images with objects of several classes -----------------------------------------------------

SCENES = ((0,), (0, 1), (1, 2), (2,), (), (0, 3), (0, 1, 2), (1,))
"""Classes of eight images with the ids 10 to 80; elk is only seen together with cat."""


def scenes(*requests: ForgetRequest, free: bool = False, **limits: object) -> ForgetSplit:
    labels = np.zeros((len(SCENES), 4), dtype=bool)
    for row, classes in enumerate(SCENES):
        labels[row, list(classes)] = True
    data: dict[Stage, Labelled] = {
        stage: Labelled(
            1000 * number + 10 * np.arange(1, 9),
            labels,
            stage,
            labels if free and stage == "train" else None,
        )
        for number, stage in enumerate(("train", "val", "test"))
    }
    return make_split(data, NAMES, requests, Limits(**limits), 0)


def roles(result: ForgetSplit, stage: str = "train", first: int = 0) -> list[list[int]]:
    """Image numbers by role: forget, retain, previous, missing."""
    return [
        [(id - first) // 10 for id in result.ids[f"{stage}/{role}"]]
        for role in ("forget", "retain", "previous", "missing")
    ]


def test_scenes_play_every_role_of_which_they_hold_an_object() -> None:
    cat, dog = ForgetRequest(classes=("cat",)), ForgetRequest(classes=("dog",))
    every = [[1, 2, 6, 7], [2, 3, 4, 5, 6, 7, 8], [], []]
    assert roles(scenes(cat)) == roles(scenes(cat), "test", 2000) == every
    assert roles(scenes(cat, dog)) == [[2, 3, 7, 8], [3, 4, 5, 6, 7], [1, 2, 6, 7], []]


def test_scenes_that_show_what_is_forgotten_can_be_kept_out_of_the_retain_set() -> None:
    cat, dog = ForgetRequest(classes=("cat",)), ForgetRequest(classes=("dog",))
    assert roles(scenes(cat, free=True)) == [[1, 2, 6, 7], [3, 4, 5, 8], [], []]
    assert roles(scenes(cat, free=True), "val", 1000)[1] == [2, 3, 4, 5, 6, 7, 8]
    assert roles(scenes(cat, dog, free=True))[1] == [4, 5]


def test_scenes_with_missing_classes_are_not_retained_in_training() -> None:
    result = scenes(ForgetRequest(classes=("cat",)), missing_classes=("owl",))
    assert roles(result) == [[1, 2, 6, 7], [2, 5, 6, 8], [], []]
    assert roles(result, "val", 1000)[1] == [2, 3, 4, 5, 6, 7, 8]
    assert roles(result, "val", 1000)[3] == [3, 4, 7]


def test_scenes_that_are_named_go_as_a_whole() -> None:
    named = ForgetRequest(samples=(20, 60))
    assert roles(scenes(named)) == [[2, 6], [1, 3, 4, 5, 7, 8], [], []]
    later = scenes(named, ForgetRequest(classes=("cat",)))
    assert roles(later) == [[1, 7], [3, 4, 5, 7, 8], [2, 6], []]


def test_shots_of_scenes_are_images_of_each_class() -> None:
    cat = ForgetRequest(classes=("cat",))
    result = scenes(cat, shots=1)
    forget, retain, *_ = roles(result)
    assert len(forget) == 1
    for index in (1, 2, 3):
        assert any(index in SCENES[number - 1] for number in retain)
    assert 5 not in retain  # background is no class
    # elk has no image that is free of cat: there is none to take, but the others are limited
    assert 1 <= len(roles(scenes(cat, free=True, shots=1))[1]) <= 2
    with pytest.raises(DataError, match="`shots` is 2, but class 'elk' has only 1"):
        scenes(cat, shots=2)
    earlier = roles(scenes(cat, ForgetRequest(classes=("elk",)), shots=1))[1]
    assert set(earlier) <= set(retain)


def test_requests_of_scenes_without_an_object_to_forget_are_refused() -> None:
    with pytest.raises(
        RequestError, match="names image 50, which has no box that is not forgotten"
    ):
        scenes(ForgetRequest(samples=(50,)))
    gone = ForgetRequest(classes=("dog",))
    with pytest.raises(
        RequestError, match="names image 80, which has no box that is not forgotten"
    ):
        scenes(gone, ForgetRequest(samples=(20, 80)))
    bare = {stage: Labelled(one.ids, np.eye(4, dtype=bool)[one.labels], one.hash)
            for stage, one in stages((5, 5, 5, 0)).items()}  # fmt: skip
    with pytest.raises(RequestError, match="names class 'elk', of which no training image has a"):
        make_split(bare, NAMES, [ForgetRequest(classes=("cat", "elk"))], Limits(), 0)
