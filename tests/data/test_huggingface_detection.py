"""Object-detection data sets of the Hugging Face library, from files made here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmforget.data.detection import DetectionDataset
from mmforget.data.digit_scenes import DigitScenes
from mmforget.data.huggingface_detection import HuggingFaceDetection
from mmforget.errors import DataError, MissingFileError
from mmforget.request import ForgetRequest

STAGES = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path: Path) -> dict[str, str]:
    scenes = DigitScenes(scenes=30, eval_scenes=8)
    files = {}
    for stage in ("train", "test"):
        files[stage] = str(tmp_path / f"{stage}.parquet")
        scenes.to_huggingface(stage).to_parquet(files[stage])
    return files


def made(path: Path, rows: list[Any], size: tuple[int, int] = (20, 10), **images: Any) -> str:
    """A parquet file with black pictures and the given objects."""
    import datasets

    pictures = images.get("pictures", [Image.new("RGB", size) for _ in rows])
    table = datasets.Dataset.from_dict({"image": pictures, "objects": rows})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(str(path))
    return str(path)


def opened(file: str, **options: Any) -> HuggingFaceDetection:
    """The same rows for training and test."""
    return HuggingFaceDetection(
        data_files={"train": file, "test": file}, val_split="test", **options
    )


def train(file: str, **options: Any) -> DetectionDataset:
    data = opened(file, **options).dataset("train")
    assert isinstance(data, DetectionDataset)
    return data


def test_parquet_files_give_pixels_boxes_and_a_held_out_validation(
    parquet: dict[str, str],
) -> None:
    scenes = DigitScenes(scenes=30, eval_scenes=8)
    data = HuggingFaceDetection(data_files=parquet, flips="none")
    assert data.class_names == scenes.class_names
    parts = [data.dataset(stage) for stage in STAGES]
    assert len(parts[0]) + len(parts[1]) == 30
    assert not set(parts[0].ids) & set(parts[1].ids)
    assert parts[2].ids.tolist() == [2 * 10**9 + row for row in range(8)]
    for part, stage in zip(parts, ("train", "train", "test"), strict=True):
        source = scenes.dataset(stage)
        for position, row in enumerate(part.ids % 10**9):
            one, other = part[position], source[int(row)]
            assert torch.equal(one["image"], other["image"])
            mine, theirs = part.objects(position), source.objects(int(row))
            assert np.allclose(mine[0], theirs[0], atol=1e-4)
            assert np.array_equal(mine[1], theirs[1])
    split = data.request(ForgetRequest(classes=("three",)))
    assert split.forget_classes == (3,)


@pytest.mark.parametrize("layout", ["lists", "objects"])
@pytest.mark.parametrize("box_format", ["coco", "pascal_voc"])
def test_layouts_formats_categories_and_crowds(
    tmp_path: Path, layout: str, box_format: str
) -> None:
    second = [2, 1, 5, 4] if box_format == "coco" else [2, 1, 7, 5]
    lists = [
        {"bbox": [[0, 0, 3, 4], second], "category": ["owl", "bat"], "iscrowd": [0, 1]},
        {"bbox": [[1, 0, 3, 4]], "category": ["owl"], "iscrowd": [0]},
        {"bbox": [], "category": [], "iscrowd": []},
    ]
    rows: list[Any] = lists
    if layout == "objects":
        rows = [
            [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]
            for row in lists
        ]
    file = made(tmp_path / "a.parquet", rows)
    data = train(file, box_format=box_format, size=(10, 20))
    assert data.class_names == ("bat", "owl")
    batch = data[[0, 1, 2]]
    assert batch["label"].tolist() == [[1, 0], [1, -1], [-1, -1]]
    assert batch["boxes"][0].tolist() == [[0, 0, 3, 4], [2, 1, 7, 5]]
    assert batch["crowd"].tolist() == [[False, True], [False] * 2, [False] * 2]


def test_whole_numbers_are_numbered_in_order_and_other_names_work(tmp_path: Path) -> None:
    rows = [{"box": [[0, 0, 3, 4], [2, 1, 5, 4]], "kind": [70, 9]}]
    file = made(tmp_path / "a.parquet", rows)
    data = train(file, box_field="box", category_field="kind", image_column="image")
    assert data.class_names == ("9", "70")
    assert data.objects(0)[1].tolist() == [1, 0]
    with pytest.raises(
        DataError, match=r"`box_field` is 'bbox', which the column .* did you mean 'box'"
    ):
        train(file)
    with pytest.raises(DataError, match=r"`category_field` is 'knd', which .* did you mean 'kind'"):
        train(file, box_field="box", category_field="knd")
    with pytest.raises(DataError, match="`objects_column` is 'object', did you mean 'objects'"):
        train(file, objects_column="object")


def test_pictures_are_turned_as_datasets_does_it(tmp_path: Path) -> None:
    pixels = np.zeros((40, 20, 3), dtype=np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    rows = [{"bbox": [[30, 0, 10, 20]], "category": [0]}, {"bbox": [], "category": []}]
    pictures = [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]
    data = train(made(tmp_path / "a.parquet", rows, pictures=pictures))
    assert data.image_shape == (3, 40, 40)
    batch = data[[0, 1]]
    assert batch["extent"].tolist() == [[20, 40], [40, 20]]
    assert batch["image"][0, :, :20, 32:].min() > 0.9
    assert batch["image"][0, :, :20, :28].max() < 0.1
    assert batch["image"][1, :, :10, :20].min() == 1


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    import json

    lines = []
    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (20, 10)).save(folder / f"{number}.png")
        objects = {"bbox": [[number, 0, 5, 5]], "category": ["owl"]}
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = HuggingFaceDetection(
        str(tmp_path / "pictures"), val_split="train", test_split="train"
    ).dataset("train")
    assert [data.objects(row)[0][0, 0] for row in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("box", [[4, 2, 0, 5], [20, 2, 8, 5], [4, float("nan"), 8, 5]])
def test_bad_boxes_are_refused_or_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, box: list[float]
) -> None:
    rows = [
        {"bbox": [[0.0, 0, 3, 4]], "category": [0]},
        {"bbox": [[15.0, 0, 9, 4], box], "category": [0, 1]},
    ]
    file = made(tmp_path / "a.parquet", rows)
    with pytest.raises(
        DataError, match=r"box 1 of row 1 of split 'train' .* `bad_boxes` to 'drop'"
    ):
        train(file)
    with caplog.at_level(logging.WARNING):
        data = train(file, bad_boxes="drop")
    assert data.objects(1)[0].tolist() == [[15, 0, 20, 4]]
    texts = [text for text in caplog.messages if "train/" in text or "/train" in text]
    assert sum("1 box(es) left out, first: box 1 of row 1" in text for text in texts) == 1
    assert sum("1 box(es) clipped to their pictures" in text for text in texts) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"bbox": [[0, 0, 3, 4]], "category": [0, 1]}, "row 0 of split 'train' has 1 boxes, but 2"),
        ({"bbox": [[0, 0, 3]], "category": [0]}, r"box 0 of row 0 of split 'train' is \[0, 0, 3\]"),
        ({"bbox": [[0, 0, 3, None]], "category": [0]}, "it must be four numbers"),
        ({"bbox": [[0, 0, 3, 4]], "category": [None]}, "has a box without a category"),
    ],
)
def test_malformed_objects_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    rows = [row, {"bbox": [[0, 0, 3, 4]], "category": [0]}]
    with pytest.raises(DataError, match=words):
        train(made(tmp_path / "a.parquet", rows))


def test_bad_options_are_refused(parquet: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"`box_format` is 'yolo', valid are: 'coco', 'pascal_voc'"):
        HuggingFaceDetection(data_files=parquet, box_format="yolo")
    with pytest.raises(MissingFileError, match=r"`data_files.test` is 'nowhere.parquet'"):
        HuggingFaceDetection(data_files={**parquet, "test": "nowhere.parquet"})
    with pytest.raises(DataError, match="`val_split` is 'tst', did you mean 'test'"):
        HuggingFaceDetection(data_files=parquet, val_split="tst").dataset("train")
    with pytest.raises(DataError, match="`image_column` is 'imge', did you mean 'image'"):
        HuggingFaceDetection(data_files=parquet, image_column="imge").dataset("train")
    with pytest.raises(DataError, match=r"`box_field` is 'bbox', .* another `objects_column`"):
        HuggingFaceDetection(data_files=parquet, objects_column="image_id").dataset("train")
