"""Digit scenes: what they show, where their boxes are, and whose handwriting it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmforget.data.detection import DetectionDataset
from mmforget.data.digit_scenes import INKED, LARGEST, MOST, SMALLEST, DigitScenes
from mmforget.data.digit_world import BACKGROUNDS, stage_strokes, strokes
from mmforget.errors import DataError
from mmforget.request import ForgetRequest

STAGES = ("train", "val", "test")


@pytest.fixture(scope="module")
def data() -> DigitScenes:
    return DigitScenes(scenes=300, eval_scenes=60)


def difference(scenes: DetectionDataset) -> np.ndarray:
    """(N, H, W) largest difference of a pixel to the background of its scene, 0 to 255."""
    colours = np.array(list(BACKGROUNDS.values()))[scenes._scenes.background]
    pixels = scenes.pixels(np.arange(len(scenes))).numpy().astype(int)
    return np.abs(pixels - colours[:, :, None, None]).max(axis=1)


def test_ink_lies_in_boxes_up_to_interpolation_and_boxes_end_at_ink(data: DigitScenes) -> None:
    scenes = data.dataset("train")
    assert isinstance(scenes, DetectionDataset)
    drawn = difference(scenes)
    rows, columns = np.mgrid[0:80, 0:80] + 0.5
    for scene in range(len(scenes)):
        boxes = scenes.objects(scene)[0]
        sizes = scenes._scenes.size[scene][scenes._scenes.used[scene]]
        around = np.zeros((80, 80), dtype=bool)
        for (left, top, right, bottom), size in zip(boxes, sizes, strict=True):
            cell = size / 8
            # half a cell of interpolated ink, and one faint cell below the threshold
            reach = 1.5 * cell
            around |= (
                (columns > left - reach)
                & (columns < right + reach)
                & (rows > top - reach)
                & (rows < bottom + reach)
            )
            inside = drawn[scene][int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
            ink = inside >= 255 * INKED / 2
            for axis in (0, 1):
                there = np.flatnonzero(ink.any(axis=axis))
                assert there[0] <= cell
                assert len(ink.any(axis=axis)) - 1 - there[-1] <= cell
        assert not drawn[scene][~around].any()


def test_boxes_cover_most_of_the_ink(data: DigitScenes) -> None:
    scenes = data.dataset("train")
    drawn = difference(scenes)
    covered = np.zeros(drawn.shape, dtype=bool)
    for scene in range(len(scenes)):
        for left, top, right, bottom in scenes.objects(scene)[0]:
            covered[scene, int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    assert drawn[covered].sum() > 0.95 * drawn.sum()
    assert covered.mean() < 0.35


def test_digits_do_not_touch_and_have_the_promised_sizes(data: DigitScenes) -> None:
    scenes = data.dataset("train")
    counts = np.diff(scenes.annotations.starts)
    assert counts.min() >= 1
    assert counts.max() == MOST
    assert (counts >= 2).mean() > 0.9
    for scene in range(len(scenes)):
        boxes, labels, crowd = scenes.objects(scene)
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        assert (sides <= LARGEST).all()
        assert (sides >= SMALLEST / 2).all()
        assert not crowd.any()
        assert (boxes >= 0).all()
        assert (boxes <= 80).all()
        for one in range(len(labels)):
            for other in range(one):
                apart = (boxes[one, :2] >= boxes[other, 2:]) | (boxes[other, :2] >= boxes[one, 2:])
                assert apart.any()
    presence = scenes.presence
    assert presence.any(axis=0).all()
    assert not presence.all(axis=1).any()


def test_no_stroke_of_test_scenes_is_drawn_in_training(data: DigitScenes) -> None:
    allowed = stage_strokes()
    drawn = {}
    for stage in STAGES:
        plan = data.dataset(stage)._scenes
        drawn[stage] = set(plan.stroke[plan.used].tolist())
        assert drawn[stage] <= set(allowed[stage].tolist())
        labels = data.dataset(stage).annotations.labels
        assert labels.tolist() == strokes()[1][plan.stroke[plan.used]].tolist()
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["val"]
    assert not drawn["val"] & drawn["test"]
    ids = np.concatenate([data.dataset(stage).ids for stage in STAGES])
    assert len(np.unique(ids)) == len(ids)


def test_a_scene_depends_on_its_id_alone(data: DigitScenes) -> None:
    few = DigitScenes(scenes=12, eval_scenes=3, seed=7, batch_size=2)
    for stage, count in (("train", 12), ("test", 3)):
        one, many = few.dataset(stage), data.dataset(stage)
        chosen = np.arange(count)
        assert torch.equal(one.pixels(chosen), many.pixels(chosen))
        assert all(
            np.array_equal(left, right)
            for row in range(count)
            for left, right in zip(one.objects(row), many.objects(row), strict=True)
        )


def test_scenes_are_frozen() -> None:
    """The shipped detector was trained on these; they may not change."""
    scenes = DigitScenes(scenes=300, eval_scenes=50).dataset("train")
    assert scenes.hash == "60c0699b82a82bd1dc2f42fde75e86d00075c24945521f2a489d656a8244aabf"


def test_augmentation_changes_nothing() -> None:
    plain = DigitScenes(scenes=6, eval_scenes=1).dataset("train")
    batch, same = plain[list(range(6))], plain.augmented(3)[list(range(6))]
    assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_roles_of_three_requests() -> None:
    data = DigitScenes(scenes=120, eval_scenes=40)
    split = data.request(*(ForgetRequest(classes=(name,)) for name in ("three", "seven", "five")))
    gone = {"forget": {5}, "previous": {3, 7}, "retain": {0, 1, 2, 4, 6, 8, 9}}
    for stage in STAGES:
        for role, classes in gone.items():
            part = data.subset(stage, role)
            assert len(part) == split.sizes()[f"{stage}/{role}"]
            labels = part[list(range(len(part)))]["label"]
            assert set(labels[labels >= 0].tolist()) <= classes
            assert ((labels >= 0).any(dim=1)).all()


def test_copy_for_hugging_face() -> None:
    data = DigitScenes(scenes=5, eval_scenes=2)
    table, scenes = data.to_huggingface("train"), data.dataset("train")
    assert table["image_id"][:] == scenes.ids.tolist()
    for row in range(5):
        boxes, labels, _ = scenes.objects(row)
        given = np.array(table[row]["objects"]["bbox"])
        assert np.allclose(given[:, :2] + given[:, 2:], boxes[:, 2:], atol=1e-4)
        assert table[row]["objects"]["category"] == labels.tolist()
        pixels = scenes.pixels(np.array([row]))[0].permute(1, 2, 0).numpy()
        assert np.array_equal(np.array(table[row]["image"]), pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scenes": 0}, "`scenes` is 0"),
        ({"eval_scenes": 1_000_001}, "`eval_scenes` is 1000001"),
        ({"side": 47}, "`side` is 47"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        DigitScenes(**options)
