"""Data that others made: Hugging Face, torchvision, CIFAR and folders, all from files made here."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmforget.data.base import ForgetDataModule
from mmforget.data.cifar import CIFAR10, CIFAR100
from mmforget.data.digit_world import DigitWorld
from mmforget.data.huggingface import HuggingFaceData
from mmforget.data.image_folder import ImageFolderData
from mmforget.data.torchvision_data import TorchvisionData
from mmforget.errors import ConfigurationError, DataError, MissingFileError
from mmforget.request import ForgetRequest

STAGES = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path: Path) -> dict[str, str]:
    world = DigitWorld(strokes=60, variants=1, eval_variants=1)
    files = {}
    for stage in ("train", "test"):
        files[stage] = str(tmp_path / f"{stage}.parquet")
        world.to_huggingface(stage).to_parquet(files[stage])
    return files


def sizes(data: ForgetDataModule) -> list[int]:
    return [len(data.dataset(stage)) for stage in STAGES]


def all_ids(data: ForgetDataModule) -> list[int]:
    return [id for stage in STAGES for id in data.dataset(stage).ids.tolist()]


# ---- Hugging Face -------------------------------------------------------------------------------


def test_parquet_files_give_pixels_labels_and_a_held_out_validation(
    parquet: dict[str, str],
) -> None:
    world = DigitWorld(strokes=60, variants=1, eval_variants=1)
    data = HuggingFaceData("parquet", data_files=parquet, val_fraction=0.2)
    assert data.class_names == world.class_names
    assert data.image_shape == (3, 32, 32)
    train, val, test = (data.dataset(stage) for stage in STAGES)
    assert len(train) + len(val) == 60
    assert 4 <= len(val) <= 20
    assert not set(train.ids) & set(val.ids)
    assert np.array_equal(test.ids, 2 * 10**9 + np.arange(60))
    for part, reference in ((train, "train"), (val, "train"), (test, "test")):
        rows = part.ids % 10**9
        source = world.dataset(reference)
        assert torch.equal(part.pixels(np.arange(len(part))), source.pixels(rows))
        assert np.array_equal(part.labels, source.labels[rows])
    again = HuggingFaceData("parquet", data_files=parquet, val_fraction=0.2, seed=9)
    assert np.array_equal(again.dataset("val").ids, val.ids)


def test_own_validation_and_missing_test_split(parquet: dict[str, str]) -> None:
    own = HuggingFaceData(data_files=parquet, val_split="test", test_split=None, test_fraction=0.3)
    train, val, test = (own.dataset(stage) for stage in STAGES)
    assert np.array_equal(val.ids, 10**9 + np.arange(60))
    assert len(train) + len(test) == 60
    assert len(set(all_ids(own))) == 120


def test_plain_columns_are_numbered_in_sorted_order(parquet: dict[str, str]) -> None:
    data = HuggingFaceData(data_files=parquet, label_column="ink", val_split="test")
    world = DigitWorld(strokes=60, variants=1, eval_variants=1, label="ink")
    inks = sorted(world.class_names)
    assert data.class_names == tuple(inks)
    expected = [inks.index(world.class_names[i]) for i in world.dataset("test").labels]
    assert data.dataset("test").labels.tolist() == expected
    split = data.request(ForgetRequest(classes=("pink",)))
    assert split.forget_classes == (inks.index("pink"),)


def test_data_without_label_column_and_with_resizing(parquet: dict[str, str]) -> None:
    data = HuggingFaceData(data_files=parquet, label_column=None, image_size=16)
    assert data.class_names == ()
    batch = next(iter(data.train_dataloader()))
    assert "label" not in batch
    assert batch["image"].shape[1:] == (3, 16, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "imge"}, "`image_column` is 'imge', did you mean 'image'"),
        ({"image_column": "caption"}, "'caption', which holds .* instead of images"),
        ({"label_column": "lable"}, "`label_column` is 'lable', did you mean 'label'"),
        ({"val_split": "tst"}, "`val_split` is 'tst', did you mean 'test'"),
        ({"train_split": "all"}, "`train_split` is 'all', valid are: 'train', 'test'"),
        ({"image_size": 0}, "`image_size` is 0"),
        ({"val_fraction": 0.001}, "has no stage 'val' and `val_fraction` 0.001"),
        ({"val_fraction": 1.0}, "`val_fraction` is 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.6}, "leave no training data"),
    ],
)
def test_bad_options_are_refused(
    parquet: dict[str, str], options: dict[str, object], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        HuggingFaceData(data_files=parquet, **options).dataset("train")


def test_missing_files_are_refused_before_anything_is_opened(parquet: dict[str, str]) -> None:
    with pytest.raises(MissingFileError, match=r"`data_files.test` is 'nowhere.parquet'"):
        HuggingFaceData(data_files={**parquet, "test": "nowhere.parquet"})


def test_unreachable_ids_and_damaged_files_are_refused(
    parquet: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match="`path` 'no/such-data' cannot be loaded"):
        HuggingFaceData("no/such-data").dataset("train")
    file = Path(parquet["train"])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot be read .* files are whole"):
        HuggingFaceData(data_files=parquet).dataset("train")


def test_several_image_columns_need_a_choice(parquet: dict[str, str], tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_parquet(parquet["train"])
    table = datasets.concatenate_datasets(
        [
            table.select_columns(["image", "label"]),
            table.select_columns("image").rename_column("image", "second"),
        ],
        axis=1,
    )
    file = str(tmp_path / "two.parquet")
    table.to_parquet(file)
    with pytest.raises(DataError, match=r"2 image columns .*name one in `image_column`"):
        HuggingFaceData(data_files={"train": file}, test_split=None).dataset("train")
    named = HuggingFaceData(data_files={"train": file}, test_split=None, image_column="second")
    assert len(named.dataset("train"))


# ---- CIFAR and torchvision ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "label"), [(CIFAR10, "label"), (CIFAR100, "fine_label")])
def test_cifar_from_parquet(
    parquet: dict[str, str], tmp_path: Path, kind: type[CIFAR10], label: str
) -> None:
    import datasets

    for file in parquet.values():
        table = datasets.Dataset.from_parquet(file).select_columns(["image", "label"])
        names = {"image": "img", "label": label}
        table.rename_columns({k: v for k, v in names.items() if k != v}).to_parquet(file)
    data = kind(str(tmp_path), val_fraction=0.2)
    assert data.num_classes == 10
    assert len(data.dataset("train")) + len(data.dataset("val")) == 60
    assert data.request(ForgetRequest(classes=("nine",))).forget_classes == (9,)


def test_missing_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        CIFAR10(str(tmp_path / "none"))
    with pytest.raises(MissingFileError, match=r"cannot be read from .*download: true"):
        CIFAR10(str(tmp_path)).dataset("train")


def write_mnist(root: Path, part: str, labels: Sequence[int]) -> np.ndarray:
    """The file format of MNIST, which torchvision reads if both parts are there."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 28, 28), np.uint8)
    header = struct.pack(">iiii", 0x803, len(labels), 28, 28)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    header = struct.pack(">ii", 0x801, len(labels))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(labels))
    return pixels


def test_torchvision_data_with_train_and_test_files(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", [0, 1, 2] * 10)
    pixels = write_mnist(tmp_path, "t10k", [2, 1, 0])
    data = TorchvisionData("MNIST", str(tmp_path), val_fraction=0.3)
    test = data.dataset("test")
    assert data.class_names[2] == "2 - two"
    assert data.request(ForgetRequest(classes=(2,))).forget_classes == (2,)
    assert test.labels.tolist() == [2, 1, 0]
    assert test.ids.tolist() == [2 * 10**9 + row for row in range(3)]
    read = test.pixels(np.arange(3)).numpy()
    assert all(np.array_equal(read[:, channel], pixels) for channel in range(3))
    assert len(data.dataset("train")) + len(data.dataset("val")) == 30


def test_torchvision_data_without_splits_holds_two_out() -> None:
    arguments = {"size": 90, "image_size": (3, 8, 8), "num_classes": 3}
    data = TorchvisionData("FakeData", dataset_args=arguments, image_size=6)
    assert sum(sizes(data)) == len(set(all_ids(data))) == 90
    assert min(sizes(data)) > 0
    assert data.class_names == ("0", "1", "2")
    assert data.image_shape == (3, 6, 6)


def test_bad_torchvision_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`dataset` is 'CIFAR11', did you mean 'CIFAR10"):
        TorchvisionData("CIFAR11", str(tmp_path)).dataset("train")
    with pytest.raises(ConfigurationError, match="has no 'sizes', did you mean 'size'"):
        TorchvisionData("FakeData", dataset_args={"sizes": 3}).dataset("train")
    with pytest.raises(ConfigurationError, match="`root` is missing"):
        TorchvisionData("MNIST").dataset("train")
    with pytest.raises(ConfigurationError, match="`val_split` is 'val', but MNIST has no named"):
        TorchvisionData("MNIST", str(tmp_path), val_split="val").dataset("train")
    with pytest.raises(ConfigurationError, match="SVHN refuses its arguments"):
        TorchvisionData("SVHN", str(tmp_path), train_split="trian").dataset("train")
    with pytest.raises(MissingFileError, match="MNIST cannot be read"):
        TorchvisionData("MNIST", str(tmp_path)).dataset("train")


# ---- folders ----------------------------------------------------------------------------------


def draw(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def fill(root: Path, count: int = 20) -> None:
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        for number in range(count):
            draw(root / name / f"{number}.png", colour)


def test_one_folder_is_split_by_path(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    data = ImageFolderData(str(tmp_path / "a"))
    assert data.class_names == ("blue", "red")
    assert sum(sizes(data)) == len(set(all_ids(data))) == 40
    train = data.dataset("train")
    assert data.image_shape == (3, 8, 12)
    for position in range(0, len(train), 5):
        image = train.pixels(np.array([position]))[0]
        assert (image[0 if train.labels[position] else 2] == 200).all()

    # another picture changes nothing for those that were there, nor does another place
    fill(tmp_path / "b")
    draw(tmp_path / "b" / "red" / "00.png", (200, 0, 0))
    other = ImageFolderData(str(tmp_path / "b"), seed=5)
    assert sum(sizes(other)) == 41
    for stage in STAGES:
        assert set(data.dataset(stage).ids) <= set(other.dataset(stage).ids)


def test_folders_by_stage(tmp_path: Path) -> None:
    fill(tmp_path / "train", 10)
    draw(tmp_path / "test" / "red" / "x.png", (200, 0, 0))
    data = ImageFolderData(str(tmp_path), val_fraction=0.3)
    assert data.dataset("test").labels.tolist() == [1]
    assert len(data.dataset("train")) + len(data.dataset("val")) == 20

    draw(tmp_path / "val" / "rde" / "x.png", (200, 0, 0))
    with pytest.raises(DataError, match=r"class 'rde' .* did you mean 'red'"):
        ImageFolderData(str(tmp_path)).dataset("train")


def test_pictures_of_different_sizes_need_a_common_one(tmp_path: Path) -> None:
    fill(tmp_path)
    for number in range(20):
        draw(tmp_path / "red" / f"{number}.png", (200, 0, 0), (9, 30))
    data = ImageFolderData(str(tmp_path))
    with pytest.raises(DataError, match="has size 9x30, the first one 12x8; set `image_size`"):
        data.dataset("train").pixels(np.arange(len(data.dataset("train"))))
    resized = ImageFolderData(str(tmp_path), image_size=6).dataset("train")
    pixels = resized.pixels(np.arange(len(resized)))
    assert pixels.shape[1:] == (3, 6, 6)
    assert (pixels[torch.from_numpy(resized.labels) == 1, 0] == 200).all()


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        ImageFolderData(str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds no pictures"):
        ImageFolderData(str(tmp_path)).dataset("train")
    fill(tmp_path)
    for file in (tmp_path / "red").iterdir():
        file.write_bytes(file.read_bytes()[:45])
    data = ImageFolderData(str(tmp_path)).dataset("train")
    with pytest.raises(DataError, match="cannot be decoded"):
        data.pixels(np.flatnonzero(data.labels == 1))
