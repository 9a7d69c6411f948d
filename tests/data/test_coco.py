"""Folders in COCO's format, from files made here."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmforget.data.coco import CocoFolder
from mmforget.data.detection import PADDING, DetectionDataset
from mmforget.errors import DataError, MissingFileError, MMForgetError
from mmforget.request import ForgetRequest

STAGES = ("train", "val", "test")
Content = dict[str, list[dict[str, Any]]]

CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 3, "name": "ant"}, {"id": 17, "name": "bee"}]
"""With gaps and in no order; the classes are ant, bee, cat."""


def content(first: int = 1) -> Content:
    """Four images of 40x20 pixels; the last one has no annotation, the third one a crowd."""
    images = [
        {"id": first + n, "file_name": f"{first + n}.png", "width": 40, "height": 20}
        for n in range(4)
    ]
    given = [
        (0, 3, [4, 2, 8, 10], 0),
        (0, 90, [20, 4, 16, 16], 0),
        (1, 17, [10.5, 5, 20, 10.25], 0),
        (2, 17, [0, 0, 40, 20], 1),
    ]
    marks = [
        {
            "id": 100 + n,
            "image_id": first + image,
            "category_id": category,
            "bbox": box,
            "iscrowd": crowd,
        }
        for n, (image, category, box, crowd) in enumerate(given)
    ]
    return {"images": images, "annotations": marks, "categories": copy.deepcopy(CATEGORIES)}


def write(root: Path, stage: str, data: object) -> None:
    (root / f"instances_{stage}.json").write_text(json.dumps(data))


def draw(root: Path, data: Content) -> None:
    """Black pictures whose first box is white."""
    (root / "images").mkdir(exist_ok=True)
    for image in data["images"]:
        pixels = np.zeros((image["height"], image["width"], 3), dtype=np.uint8)
        for mark in data["annotations"][:2]:
            if mark["image_id"] == image["id"]:
                left, top, width, height = mark["bbox"]
                pixels[top : top + height, left : left + width] = 255
        Image.fromarray(pixels).save(root / "images" / image["file_name"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for stage, first in (("train", 1), ("val", 11), ("test", 21)):
        data = content(first)
        draw(tmp_path, data)
        write(tmp_path, stage, data)
    return tmp_path


def train(root: Path, **options: Any) -> DetectionDataset:
    data = CocoFolder(str(root), **options).dataset("train")
    assert isinstance(data, DetectionDataset)
    return data


def changed(root: Path, change: Callable[[Content], Any], stage: str = "train") -> Path:
    data = content({"train": 1, "val": 11, "test": 21}[stage])
    change(data)
    write(root, stage, data)
    return root


# ---- what comes out -----------------------------------------------------------------------------


def test_classes_ids_boxes_and_crowds(root: Path) -> None:
    data = CocoFolder(str(root))
    assert data.class_names == ("ant", "bee", "cat")
    assert data.category_ids == (3, 17, 90)
    assert data.image_shape == (3, 20, 40)
    for stage, first in (("train", 1), ("val", 11), ("test", 21)):
        assert data.dataset(stage).ids.tolist() == [first, first + 1, first + 2, first + 3]
    batch = data.dataset("train")[[0, 1, 2, 3]]
    assert batch["label"].tolist() == [[0, 2], [1, -1], [1, -1], [-1, -1]]
    assert batch["boxes"][0].tolist() == [[4, 2, 12, 12], [20, 4, 36, 20]]
    assert batch["boxes"][1, 0].tolist() == [10.5, 5, 30.5, 15.25]
    assert batch["crowd"].tolist() == [[False] * 2, [False] * 2, [True, False], [False] * 2]
    assert batch["extent"].tolist() == [[20, 40]] * 4
    assert (batch["image"][0, :, 2:12, 4:12] == 1).all()
    assert batch["image"].sum() == 3 * (80 + 256)
    split = data.request(ForgetRequest(classes=("cat",)))
    assert split.ids["train/retain"] == (1, 2, 3, 4)
    assert split.ids["test/forget"] == (21,)


def test_larger_pictures_are_scaled_down_with_their_boxes(root: Path) -> None:
    batch = train(root, size=(20, 20))[[0, 1]]
    assert batch["image"].shape == (2, 3, 20, 20)
    assert batch["extent"].tolist() == [[10, 20]] * 2
    assert batch["boxes"][0].tolist() == [[2, 1, 6, 6], [10, 2, 18, 10]]
    assert not batch["image"][:, :, 10:].any()
    assert batch["image"][0, 0, 2:5, 3:5].min() > 0.9
    assert torch.equal(train(root, size=20)[[0]]["boxes"], batch["boxes"][:1])


def test_smaller_pictures_lie_in_the_corner_unless_they_are_enlarged(root: Path) -> None:
    batch = train(root, size=(50, 80))[[0]]
    assert batch["extent"].tolist() == [[20, 40]]
    assert batch["boxes"][0, 0].tolist() == [4, 2, 12, 12]
    assert not batch["image"][:, :, 20:].any()
    assert not batch["image"][:, :, :, 40:].any()
    batch = train(root, size=(50, 80), enlarge=True)[[0]]
    assert batch["extent"].tolist() == [[40, 80]]
    assert batch["boxes"][0, 0].tolist() == [8, 4, 24, 24]
    assert batch["image"][0, 0, 6:22, 10:22].min() > 0.9


def test_mixed_sizes_share_the_largest_canvas(root: Path) -> None:
    def tall(data: Content) -> None:
        data["images"][3] |= {"width": 10, "height": 35}
        draw(root, data)

    data = train(changed(root, tall))
    assert data.image_shape == (3, 35, 40)
    assert data[[0, 3]]["extent"].tolist() == [[20, 40], [35, 10]]
    assert data.augmented(0)[[0, 3]]["image"].shape == (2, 3, 35, 40)


def test_flips_keep_boxes_on_their_objects(root: Path) -> None:
    data = train(root, size=(30, 44), flips="both", enlarge=False)
    found = set()
    for seed in range(20):
        batch = data.augmented(seed)[[0]]
        for box in batch["boxes"][0]:
            left, top, right, bottom = box.int().tolist()
            assert (batch["image"][0, :, top:bottom, left:right] == 1).all()
        found.add(tuple(batch["boxes"][0, 0].tolist()))
    assert len(found) == 4
    assert train(root, flips="none").augmented(1)[[0]]["boxes"][0, 0].tolist() == [4, 2, 12, 12]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_pictures_of_other_modes(root: Path, mode: str) -> None:
    path = root / "images" / "1.png"
    kind = "TIFF" if mode == "CMYK" else "PNG"
    Image.open(path).convert(mode).save(path, kind)
    assert (train(root)[[0]]["image"][0, :, 2:12, 4:12] == 1).all()


def test_deep_damaged_and_exchanged_pictures_are_refused_when_they_are_read(root: Path) -> None:
    folder = root / "images"
    Image.fromarray(np.zeros((20, 40), dtype=np.uint16)).save(folder / "1.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
    Image.new("RGB", (41, 20)).save(folder / "3.png")
    data = train(root)
    for place, words in enumerate(
        (
            r"image 1 of data set .* more than 8 bits per channel",
            r"image 2 of data set .* cannot be decoded",
            r"image 3 of data set .* has 41x20 pixels, but its boxes were made for 40x20",
        )
    ):
        with pytest.raises(DataError, match=words):
            data[[place]]


def test_orientation_is_applied_where_the_file_means_the_turned_picture(root: Path) -> None:
    pixels = np.zeros((40, 20, 3), dtype=np.uint8)
    pixels[:10] = 255  # the top as stored, the right after turning by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(root / "images" / "1.jpg", exif=exif, quality=95)

    def turned(data: Content) -> None:
        data["images"][0]["file_name"] = "1.jpg"

    image = train(changed(root, turned))[[0]]["image"][0]
    assert image[:, :, 32:].min() > 0.9
    assert image[:, :, :28].max() < 0.1

    def stored(data: Content) -> None:
        turned(data)
        data["images"][0] |= {"width": 20, "height": 40}
        data["annotations"].pop(1)

    image = train(changed(root, stored), size=(40, 40))[[0]]["image"][0]
    assert image[:, :8, :20].min() > 0.9


def test_sizes_may_be_left_to_the_pictures(root: Path) -> None:
    def nameless(data: Content) -> None:
        for image in data["images"]:
            del image["width"]

    assert train(changed(root, nameless))[[0]]["extent"].tolist() == [[20, 40]]


def test_image_ids_of_several_files_are_kept_apart(root: Path) -> None:
    for stage in ("val", "test"):
        write(root, stage, content(1))
    data = CocoFolder(str(root))
    assert [data.dataset(stage).ids[0] for stage in STAGES] == [1, 10**9 + 1, 2 * 10**9 + 1]
    data.request(ForgetRequest(samples=(1,)))
    assert len(data.subset("train", "forget")) == 1
    assert len(data.subset("val", "forget")) == 0
    numbers = content(1)
    for image in numbers["images"]:
        image["id"] += 10**9
    write(root, "train", {**numbers, "annotations": []})
    with pytest.raises(DataError, match="use the same image ids, some above"):
        train(root)


def test_missing_stages_are_held_out_by_id(tmp_path: Path) -> None:
    data = content()
    data["images"] = [
        {"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(100)
    ]
    data["annotations"] = [
        {"id": n, "image_id": n, "category_id": 3, "bbox": [1, 1, n / 50 + 1, 2]} for n in range(99)
    ]
    write(tmp_path, "train", data)
    (tmp_path / "images").mkdir()
    for n in range(100):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{n}.png")
    ids = []
    for seed in (0, 5):
        module = CocoFolder(str(tmp_path), val=None, test=None, seed=seed)
        ids.append([module.dataset(stage).ids.tolist() for stage in STAGES])
    assert ids[0] == ids[1]
    assert sorted(id for part in ids[0] for id in part) == list(range(100))
    assert len(ids[0][1]) > 2
    assert len(ids[0][2]) > 8
    for stage in STAGES:
        part = module.dataset(stage)
        for position, sample in enumerate(part.ids.tolist()):
            boxes = part.objects(position)[0]
            if sample < 99:
                assert boxes[0, 2] == pytest.approx(2 + sample / 50)
            else:
                assert len(boxes) == 0


def test_hash_depends_on_boxes_and_size(root: Path) -> None:
    one = train(root).hash
    assert train(root).hash == one
    assert train(root, size=(10, 20)).hash != one

    def move(data: Content) -> None:
        data["annotations"][0]["bbox"][0] += 1

    assert train(changed(root, move)).hash != one


def test_images_by_stage(root: Path) -> None:
    for stage in STAGES:
        (root / stage).mkdir()
    for path in (root / "images").iterdir():
        stage = STAGES[int(path.stem) // 10]
        path.rename(root / stage / path.name)
    images = {stage: stage for stage in STAGES}
    assert (train(root, images=images)[[0]]["image"][0, :, 2:12, 4:12] == 1).all()
    with pytest.raises(DataError, match="`images` names no folder for the stage 'test'"):
        CocoFolder(str(root), images={"train": "train", "val": "val"})
    with pytest.raises(DataError, match="`images` names the stage 'tst', did you mean 'test'"):
        CocoFolder(str(root), images={**images, "tst": "x"})


def test_data_module_can_be_sent_to_another_process(root: Path) -> None:
    data = CocoFolder(str(root))
    batch = data.dataset("train")[[0, 2]]
    again = pickle.loads(pickle.dumps(data)).dataset("train")[[0, 2]]
    assert all(torch.equal(batch[key], again[key]) for key in batch)


# ---- boxes that are wrong -----------------------------------------------------------------------


def boxes(*given: list[float]) -> Callable[[Content], None]:
    def change(data: Content) -> None:
        for number, box in enumerate(given):
            data["annotations"][number]["bbox"] = box

    return change


def test_boxes_that_leave_the_picture_are_clipped_with_one_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = train(changed(root, boxes([-1, 2, 9, 10], [30, 10, 30, 30], [0, 0, 40.001, 20])))
    assert data.objects(0)[0].tolist() == [[0, 2, 8, 12], [30, 10, 40, 20]]
    assert data.objects(1)[0].tolist() == [[0, 0, 40, 20]]
    assert len(caplog.messages) == 1
    assert "2 box(es) clipped to their pictures, first: annotation 100" in caplog.text


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([4, 2, 0, 10], "has no area"),
        ([4, 2, 8, -1], "has no area"),
        ([40, 2, 8, 10], "lies outside of its picture"),
        ([4, -12, 8, 10], "lies outside of its picture"),
        ([float("nan"), 2, 8, 10], "is not finite"),
        ([4, 2, float("inf"), 10], "is not finite"),
    ],
)
def test_boxes_that_are_no_annotations_are_refused_or_dropped(
    root: Path, caplog: pytest.LogCaptureFixture, box: list[float], words: str
) -> None:
    changed(root, boxes(box))
    with pytest.raises(DataError) as caught:
        train(root)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("annotation 100 of image 1 ('1.png')", "instances_train.json", words, "40x20",
                 "set `bad_boxes` to 'drop'", "(left, top, right, bottom)"):  # fmt: skip
        assert part in text
    with caplog.at_level(logging.WARNING):
        data = train(root, bad_boxes="drop")
    assert len(caplog.messages) == 1
    assert "1 box(es) left out, first: annotation 100" in caplog.text
    assert data.objects(0)[1].tolist() == [2]
    assert data[[0]]["label"].tolist() == [[2]]


def test_all_bad_boxes_are_counted(root: Path) -> None:
    with pytest.raises(DataError, match=r"\(1 more like it\); mend it"):
        train(changed(root, boxes([4, 2, 0, 10], [4, 2, 0, 10])))


# ---- files that are wrong -----------------------------------------------------------------------


def put(kind: str, row: int, **values: Any) -> Callable[[Content], None]:
    return lambda data: data[kind][row].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("annotations", 1, image_id=99), "annotation 101 in .* belongs to image 99, which"),
        (
            put("annotations", 1, category_id=4),
            "annotation 101 in .* category id 4, valid are: '3'",
        ),
        (put("annotations", 1, category_id=[4]), r"annotation 101 in .* category id \[4\]"),
        (put("annotations", 1, id=100), "has the annotation id 100 twice"),
        (put("annotations", 1, id=[1]), r"has an annotation whose `id` is \[1\]"),
        (put("annotations", 1, image_id="1"), "has an annotation whose `image_id` is '1'"),
        (
            put("annotations", 1, bbox=[1, 2, 3]),
            r"annotation 101 in .* `bbox` \[1, 2, 3\]; it must",
        ),
        (put("annotations", 1, bbox=None), "`bbox` None; it must be four numbers"),
        (put("annotations", 1, bbox=[1, 2, "3", 4]), "it must be four numbers"),
        (put("images", 1, id=1), "has the image id 1 twice"),
        (put("images", 1, id=None), "has an image whose `id` is None"),
        (put("images", 1, file_name=None), "image 2 in .* has no `file_name`"),
        (put("categories", 1, id=90), "has the category id 90 twice"),
        (put("categories", 1, name="cat"), "category 3 in .* has the name 'cat', which is"),
        (put("categories", 1, name="ants"), r"do not have the same categories, see 3 \('ant"),
        (lambda data: data["categories"].pop(), "category id 17, valid are: '3', '90'"),
        (lambda data: data.update(categories=[]), "has no categories"),
        (lambda data: data.update(images=[], annotations=[]), "lists no images"),
        (lambda data: data.pop("annotations"), "has no list of objects `annotations`; it must be"),
        (lambda data: data.update(images=[1]), "has no list of objects `images`"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    root: Path, change: Callable[[Content], Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        train(changed(root, change))
    assert "\n" not in str(caught.value)
    assert "instances_train.json" in str(caught.value)


def test_damaged_files_and_other_json_are_refused(root: Path) -> None:
    path = root / "instances_val.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"instances_val.json' is not valid JSON"):
        train(root)
    write(root, "val", [1, 2])
    with pytest.raises(DataError, match="has no list of objects `images`"):
        train(root)


def test_categories_that_differ_between_files_are_refused(root: Path) -> None:
    changed(root, lambda data: data["categories"].append({"id": 5, "name": "dog"}), "test")
    with pytest.raises(DataError, match=r"instances_test.json' and .* see 5 \('dog'\)"):
        train(root)


def test_pictures_that_do_not_exist(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "images" / "4.png").unlink()  # nothing is annotated in it
    with caplog.at_level(logging.WARNING):
        assert train(root).ids.tolist() == [1, 2, 3]
    assert "lists 1 images without annotations whose pictures do not exist, first 4" in caplog.text
    (root / "images" / "2.png").unlink()
    with pytest.raises(MissingFileError, match=r"2.png' of image 2 in .* does not exist; check"):
        train(root)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": "nowhere"}, "`folder` is 'nowhere', which does not exist"),
        ({"train": "x.json"}, "`train` is '.*x.json', which does not exist; give the annotation"),
        ({"val": "x.json"}, "`val` is .* or null to hold pictures out of training"),
        ({"images": "x"}, "`images` is '.*x', which does not exist"),
        ({"size": 0}, "`size` is 0"),
        ({"size": (4, 5, 6)}, "`size` is .4, 5, 6., it must be height and width"),
        ({"flips": "vertical"}, "`flips` is 'vertical', valid are: 'none', 'horizontal', 'both'"),
        ({"bad_boxes": "dropp"}, "`bad_boxes` is 'dropp', did you mean 'drop'"),
        ({"val_fraction": 2.0}, "`val_fraction` is 2.0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    root: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(MMForgetError, match=words):
        CocoFolder(**{"folder": str(root), **options})


def test_batches_have_the_padding_label(root: Path) -> None:
    assert train(root)[[3]]["label"].tolist() == [[PADDING, PADDING]]
