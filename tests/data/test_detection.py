"""Scenes with boxes: batches, roles, views, augmentation, and several processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import GlobalBatchSampler, ImageDataset
from mmforget.data.detection import (
    PADDING,
    Annotations,
    DetectionDataModule,
    DetectionDataset,
    Flips,
    flip,
)
from mmforget.data.split import Stage
from mmforget.errors import AccessError, DataError, RequestError
from mmforget.request import ForgetRequest

NAMES = ("ant", "bee", "cat", "dog")
HEIGHT, WIDTH = 12, 16

TRAIN: tuple[tuple[int, ...], ...] = ((0,), (0, 1), (1, 2), (2,), (), (0, 0, 2), (1,), (3,))
"""Classes of the boxes of eight training images, ids 100 to 107; ant is in 0, 1, 5."""
OTHER: tuple[tuple[int, ...], ...] = ((0, 1), (1,), (3,), ())


class Blocks(DetectionDataset):
    """Every box of class c is filled with the grey value 50 * (c + 1); ids count from `start`."""

    def __init__(
        self,
        name: str,
        start: int,
        classes: Sequence[Sequence[int]],
        crowds: Sequence[tuple[int, int]] = (),
        flips: Flips = "both",
        shift: float = 0,
    ) -> None:
        images = []
        for image, labels in enumerate(classes):
            left = 4.0 * np.arange(len(labels)) + shift
            boxes = np.stack([left, left * 0 + 2, left + 3, left * 0 + 5 + image % 3], axis=1)
            crowd = np.array([(image, place) in crowds for place in range(len(labels))], dtype=bool)
            images.append((boxes.reshape(-1, 4), np.array(labels, dtype=int), crowd))
        extents = np.array(
            [(HEIGHT - image % 4, WIDTH - image % 2) for image in range(len(images))]
        )
        super().__init__(
            name,
            start + np.arange(len(images)),
            Annotations.of(images),
            NAMES,
            (3, HEIGHT, WIDTH),
            extents,
            flips,
        )

    def read(self, rows: np.ndarray) -> Tensor:
        pixels = torch.zeros(len(rows), 3, HEIGHT, WIDTH, dtype=torch.uint8)
        marks = self.annotations
        for place, row in enumerate(rows):
            for box in range(marks.starts[row], marks.starts[row + 1]):
                left, top, right, bottom = marks.boxes[box].astype(int)
                pixels[place, :, top:bottom, left:right] = 50 * (int(marks.labels[box]) + 1)
        return pixels


class BlockData(DetectionDataModule):
    def __init__(
        self,
        train: Sequence[Sequence[int]] = TRAIN,
        crowds: Sequence[tuple[int, int]] = (),
        test: Sequence[Sequence[int]] = OTHER,
        **options: Any,
    ) -> None:
        super().__init__(**{"batch_size": 3, **options})
        self.given = (train, crowds, test)

    def build(self) -> dict[Stage, ImageDataset]:
        train, crowds, test = self.given
        return {
            "train": Blocks("blocks/train", 100, train, crowds),
            "val": Blocks("blocks/val", 200, OTHER),
            "test": Blocks("blocks/test", 300, test),
        }


def forget(*classes: str | int, **options: Any) -> BlockData:
    data = BlockData(**options)
    data.request(*(ForgetRequest(classes=(one,)) for one in classes))
    return data


def shown(data: DetectionDataset) -> dict[int, list[int]]:
    """Labels of the boxes that are given out, by id."""
    batch = data[list(range(len(data)))]
    return {
        int(id): label[label != PADDING].tolist()
        for id, label in zip(batch["id"], batch["label"], strict=True)
    }


# ---- batches ------------------------------------------------------------------------------------


def test_batch_has_boxes_labels_crowds_and_extents_of_fixed_shape() -> None:
    data = Blocks("a", 100, TRAIN, crowds=[(5, 1)])
    batch = data[[5, 4, ~1]]
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (3, 3, HEIGHT, WIDTH),
        "id": (3,),
        "weight": (3,),
        "extent": (3, 2),
        "boxes": (3, 3, 4),
        "label": (3, 3),
        "crowd": (3, 3),
    }
    assert batch["label"].tolist() == [[0, 0, 2], [-1, -1, -1], [0, 1, -1]]
    assert batch["boxes"][0].tolist() == [[0, 2, 3, 7], [4, 2, 7, 7], [8, 2, 11, 7]]
    assert batch["boxes"][1].abs().sum() == 0
    assert batch["crowd"].tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert batch["extent"].tolist() == [[11, 15], [12, 16], [11, 15]]
    assert batch["weight"].tolist() == [1, 1, 0]
    assert batch["id"].tolist() == [105, 104, 101]
    one = data[~1]
    assert one["boxes"].shape == (3, 4)
    assert one["weight"] == 0


def test_a_subset_keeps_the_boxes_of_its_images_and_what_is_shown() -> None:
    data = Blocks("a", 100, TRAIN)
    assert shown(data.showing([0]).subset(np.array([5, 2]))) == {105: [0, 0], 102: []}
    choice = np.zeros((2, 4), dtype=bool)
    choice[0, 2] = choice[1, 1] = True
    view = data.subset(np.array([5, 2])).showing(choice)
    assert shown(view) == {105: [2], 102: [1]}
    assert shown(view.subset(np.array([1]))) == {102: [1]}
    assert view.classes is not None
    assert view.classes.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]  # hidden ones are still there


def test_a_view_without_labels_gives_neither_boxes_nor_classes() -> None:
    data = Blocks("a", 100, TRAIN)
    view = data.unlabelled()
    assert set(view[[0, 1]]) == {"image", "id", "weight", "extent"}
    assert view.classes is None
    assert len(view.objects(1)[1]) == 0
    assert shown(data)[101] == [0, 1]


def test_hash_depends_on_boxes_labels_crowds_and_views() -> None:
    data = Blocks("a", 100, TRAIN)
    changed = [
        Blocks("a", 100, TRAIN, shift=0.5),
        Blocks("a", 100, ((1,), *TRAIN[1:])),
        Blocks("a", 100, TRAIN, crowds=[(5, 1)]),
        Blocks("a", 101, TRAIN),
        data.showing([0]),
        data.subset(np.arange(3)),
        data.unlabelled(),
    ]
    assert data.hash == Blocks("a", 100, TRAIN).hash == data.augmented(3).hash
    assert len({one.hash for one in (data, *changed)}) == 8


@pytest.mark.parametrize(
    ("box", "label"),
    [
        ((2, 2, 2, 5), 0),
        ((2, 5, 4, 2), 0),
        ((-1, 2, 4, 5), 0),
        ((2, 2, 17, 5), 0),
        ((2, 2, 4, 13), 0),
        ((2, 2, float("nan"), 5), 0),
        ((2, 2, 4, 5), 4),
    ],
)
def test_boxes_outside_of_their_picture_and_unknown_classes_are_refused(
    box: tuple[float, ...], label: int
) -> None:
    class Given(Blocks):
        def __init__(self) -> None:
            marks = Annotations.of([(np.array([box]), np.array([label]), np.zeros(1, bool))])
            DetectionDataset.__init__(self, "g", np.array([9]), marks, NAMES, (3, HEIGHT, WIDTH))

    words = (
        "class index 4, but 4 classes" if label else "1 boxes .* class 'ant' in image 9 of 16x12"
    )
    with pytest.raises(DataError, match=words):
        Given()


# ---- augmentation -------------------------------------------------------------------------------


def test_flips_by_hand() -> None:
    batch = {
        "image": torch.arange(6.0).reshape(1, 1, 2, 3).repeat(1, 3, 1, 1),
        "boxes": torch.tensor([[[0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]]),
        "label": torch.tensor([[1, PADDING]]),
        "extent": torch.tensor([[2, 2]]),
        "id": torch.tensor([0]),
    }
    found = set()
    for seed in range(40):
        mine = {key: value.clone() for key, value in batch.items()}
        flip(mine, seed, (0, 0), "both")
        found.add((str(mine["image"][0, 0].tolist()), str(mine["boxes"][0].tolist())))
    zero = "[0.0, 0.0, 0.0, 0.0]]"
    assert found == {
        ("[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]", f"[[0.0, 1.0, 1.0, 2.0], {zero}"),
        ("[[1.0, 0.0, 2.0], [4.0, 3.0, 5.0]]", f"[[1.0, 1.0, 2.0, 2.0], {zero}"),
        ("[[3.0, 4.0, 2.0], [0.0, 1.0, 5.0]]", f"[[0.0, 0.0, 1.0, 1.0], {zero}"),
        ("[[4.0, 3.0, 2.0], [1.0, 0.0, 5.0]]", f"[[1.0, 0.0, 2.0, 1.0], {zero}"),
    }


@pytest.mark.parametrize(("flips", "kinds"), [("none", 1), ("horizontal", 2), ("both", 4)])
def test_boxes_stay_on_their_objects_within_the_picture(flips: Flips, kinds: int) -> None:
    data = Blocks("a", 100, TRAIN, flips=flips)
    plain = data[list(range(8))]
    found = set()
    for seed in range(12):
        batch = data.augmented(seed)[list(range(8))]
        assert torch.equal(batch["label"], plain["label"])
        for place in range(8):
            image = batch["image"][place].clone()
            for box, label in zip(batch["boxes"][place], batch["label"][place], strict=True):
                if label != PADDING:
                    left, top, right, bottom = box.int().tolist()
                    inside = image[:, top:bottom, left:right]
                    assert (inside == 50 * (int(label) + 1) / 255).all()
                    inside.zero_()
            assert not image.any()  # nothing outside of the boxes
            height, width = batch["extent"][place].tolist()
            assert not batch["image"][place, :, height:].any()
            assert not batch["image"][place, :, :, width:].any()
        found.add(str(batch["boxes"][0, 0].tolist()))
    assert len(found) == kinds


def test_augmentation_leaves_the_source_as_it_is_and_is_keyed_by_sample() -> None:
    data = Blocks("a", 100, TRAIN)
    before = data[list(range(8))]
    view = data.augmented(5)
    whole, part = view[list(range(8))], view[[6, 1]]
    assert not torch.equal(whole["image"], before["image"])
    for key in ("image", "boxes", "label"):
        assert torch.equal(whole[key][[6, 1]], part[key])
        assert torch.equal(data[list(range(8))][key], before[key])


# ---- several processes --------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_the_processes_together_get_the_batches_of_one(world: int) -> None:
    data = forget("ant", augment=True).subset("train", "retain").augmented(0)

    def batches(rank: int, world: int) -> list[dict[str, Tensor]]:
        sampler = GlobalBatchSampler(data, 4, True, 1, "train", 2, rank, world)
        return [data[positions] for positions in sampler]

    parts = [batches(rank, world) for rank in range(world)]
    for number, single in enumerate(batches(0, 1)):
        together = {
            key: torch.cat([part[number][key] for part in parts]) for key in parts[0][number]
        }
        real = together["weight"] > 0
        order, other = single["id"].argsort(), together["id"][real].argsort()
        for key, value in single.items():
            assert torch.equal(value[order], together[key][real][other]), key
        padding = set(together["id"][~real].tolist())
        assert padding <= set(single["id"].tolist())


def test_loader_workers_give_the_same_batches() -> None:
    own, helped = (forget("ant", augment=True, num_workers=n, view="paired") for n in (0, 2))
    for (left, *_), (right, *_) in zip(
        own.train_dataloader(), helped.train_dataloader(), strict=True
    ):
        for role in ("forget", "retain"):
            assert left[role].keys() == right[role].keys()
            assert all(torch.equal(left[role][key], right[role][key]) for key in left[role])


# ---- roles --------------------------------------------------------------------------------------


def test_an_image_plays_every_role_of_which_it_holds_an_object_with_those_boxes_only() -> None:
    data = forget("bee", "ant")
    assert shown(data.subset("train", "forget")) == {100: [0], 101: [0], 105: [0, 0]}
    # 101 shows ant and bee only, both gone; 104 is background
    assert shown(data.subset("train", "retain")) == {
        102: [2], 103: [2], 104: [], 105: [2], 107: [3],
    }  # fmt: skip
    assert shown(data.subset("train", "previous")) == {101: [1], 102: [1], 106: [1]}
    assert shown(data.subset("test", "forget")) == {300: [0]}
    assert shown(data.subset("test", "retain")) == {302: [3], 303: []}
    assert data.split is not None
    assert data.split.sizes()["train/retain"] == 5
    assert shown(data.dataset("train"))[105] == [0, 0, 2]  # the full view hides nothing


def test_statistics_shows_an_image_of_two_roles_twice_with_its_own_boxes() -> None:
    data = forget("ant", view="statistics")
    batches = list(data.train_dataloader())
    rows = [
        (int(id), bool(gone), label[label != PADDING].tolist())
        for batch in batches
        for id, gone, label in zip(batch["id"], batch["forget"], batch["label"], strict=True)
    ]
    assert rows == [
        (100, True, [0]),
        (101, True, [0]),
        (101, False, [1]),
        (102, False, [1, 2]),
        (103, False, [2]),
        (104, False, []),
        (105, True, [0, 0]),
        (105, False, [2]),
        (106, False, [1]),
        (107, False, [3]),
    ]


def test_mixed_images_can_be_kept_out_of_the_retain_set_in_training_alone() -> None:
    data = forget("ant", mixed_images="forget", crowds=[(3, 0)], train=(*TRAIN, (3, 0)))
    assert data.split is not None
    retained = [102, 103, 104, 106, 107]
    assert sorted(shown(data.subset("train", "retain"))) == retained
    assert sorted(shown(data.subset("train", "retain", whole=True))) == retained
    assert data.split.ids["train/retain"] == tuple(retained)
    assert shown(data.subset("test", "retain"))[300] == [1]
    data.view = "statistics"
    seen = [int(id) for b in data.train_dataloader() for id in b["id"][~b["forget"]]]
    assert seen == retained
    # a crowd of what is forgotten can be seen as well
    crowd = forget("ant", mixed_images="forget", crowds=[(8, 1)], train=(*TRAIN, (3, 0)))
    assert 108 not in shown(crowd.subset("train", "retain"))
    assert shown(forget("ant", crowds=[(8, 1)], train=(*TRAIN, (3, 0))).subset("train", "retain"))[
        108
    ] == [3]


def test_mixed_images_that_leave_nothing_are_refused_and_lost_classes_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(RequestError, match=r"leaves no training sample .* to filter"):
        forget("ant", mixed_images="forget", train=((0, 1), (0, 2)))
    with caplog.at_level(logging.WARNING):
        data = forget("ant", mixed_images="forget", train=((0, 1), (0, 2), (2,)))
        data.request(ForgetRequest(classes=("ant",)))
    texts = [text for text in caplog.messages if "free of forgotten" in text]
    assert len(texts) == 1
    assert "(bee)" in texts[0]
    with pytest.raises(DataError, match="`mixed_images` is 'forgt', did you mean 'forget'"):
        BlockData(mixed_images="forgt")


def test_a_forget_class_in_every_image_works_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        data = forget("ant", train=((0, 1), (0, 2), (0,)), test=((0, 1),))
        data.request(ForgetRequest(classes=("ant",)))
        data.unlimited()
    texts = [text for text in caplog.messages if "every training image" in text]
    assert len(texts) == 1
    assert "(ant)" in texts[0]
    assert shown(data.subset("train", "forget")) == {100: [0], 101: [0], 102: [0]}
    assert shown(data.subset("train", "retain")) == {100: [1], 101: [2]}


def test_crowds_are_shown_with_their_class_but_make_no_image_one_of_it() -> None:
    data = forget("ant", crowds=[(0, 0), (5, 2)])
    assert 100 not in shown(data.subset("train", "forget"))
    assert shown(data.subset("train", "retain"))[100] == []
    assert 105 not in shown(data.subset("train", "retain"))  # its cats are a crowd
    batch = forget("bee", crowds=[(5, 2)]).subset("train", "retain")
    position = int(np.flatnonzero(batch.ids == 105)[0])
    assert batch[position]["crowd"].tolist() == [False, False, True]


def test_missing_classes_are_not_in_training_and_retained_in_evaluation() -> None:
    data = forget("ant", missing_classes=("bee",))
    assert shown(data.subset("train", "retain")) == {103: [2], 104: [], 105: [2], 107: [3]}
    assert shown(data.subset("test", "missing")) == {300: [1], 301: [1]}
    assert shown(data.subset("test", "retain"))[300] == [1]
    assert 102 in shown(data.subset("train", "retain", whole=True))
    assert shown(data.unlimited().subset("train", "retain"))[106] == [1]


def test_shots_and_fractions_count_images() -> None:
    data = forget("ant", shots=1)
    assert data.split is not None
    assert data.split.sizes()["train/forget"] == 1
    retain = shown(data.subset("train", "retain"))
    assert {label for labels in retain.values() for label in labels} == {1, 2, 3}
    assert len(retain) <= 3
    half = forget("ant", retain_fraction=0.5)
    assert half.split is not None
    assert half.split.sizes()["train/retain"] == 4
    assert half.split.sizes()["train/forget"] == 3
    with pytest.raises(DataError, match="`shots` is 2, but class 'dog' has only 1"):
        forget("ant", shots=2)


def test_images_that_are_named_go_as_a_whole() -> None:
    data = BlockData()
    split = data.request(ForgetRequest(classes=("bee",)), ForgetRequest(samples=(101, 105)))
    assert split.forget_classes == ()
    # bee was forgotten before, so that there is nothing left of it to forget
    assert shown(data.subset("train", "forget")) == {101: [0], 105: [0, 0, 2]}
    assert not {101, 105} & set(shown(data.subset("train", "retain")))
    assert shown(data.subset("train", "previous")) == {102: [1], 106: [1]}
    assert data.split is not None
    assert data.split.sizes()["test/forget"] == 0

    data.request(ForgetRequest(samples=(101, 105)), ForgetRequest(classes=("ant",)))
    assert shown(data.subset("train", "previous")) == {101: [0, 1], 105: [0, 0, 2]}
    assert shown(data.subset("train", "forget")) == {100: [0]}


def test_requests_without_a_box_to_forget_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestError, match="names class 'dog', of which no training image has"):
        forget("dog", train=TRAIN[:-1])
    with pytest.raises(RequestError, match="names image 104, which has no box that is not"):
        BlockData().request(ForgetRequest(samples=(101, 104)))
    with pytest.raises(RequestError, match="names image 106, which has no box that is not"):
        BlockData().request(ForgetRequest(classes=("bee",)), ForgetRequest(samples=(106,)))
    with caplog.at_level(logging.WARNING):
        data = forget("ant", train=TRAIN[:-1])
    assert "objects that training data lacks (dog)" in caplog.text
    assert shown(data.subset("test", "retain"))[302] == [3]
    assert forget("ant", train=TRAIN[:-1], shots=2).split is not None  # dog has no training image


def test_a_method_gets_the_boxes_that_it_declares() -> None:
    data = forget("ant").restricted(DataAccess(forget_labels=False, retain="full"))
    part = data.subset("train", "forget")
    assert "boxes" not in part[[0]]
    assert len(part.objects(0)[1]) == 0
    assert "boxes" in data.subset("train", "retain")[[0]]
    data.view = "statistics"
    assert "boxes" not in next(iter(data.train_dataloader()))
    with pytest.raises(AccessError):
        data.dataset("train")
