"""Detection data in COCO's format: annotation files, and pictures in a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmforget.data.base import ImageDataset, View
from mmforget.data.boxes import BadBoxes, RawBoxes, canvas_of, check_bad_boxes, xyxy
from mmforget.data.detection import DetectionDataModule, Flips, MixedImages, check_flips
from mmforget.data.pictures import STAGE_IDS, check_fractions, complete
from mmforget.data.scene_pictures import ScenePictures, upright, upright_size
from mmforget.data.split import STAGES, Stage
from mmforget.errors import DataError, MissingFileError, suggest

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class CocoFolder(DetectionDataModule):
    """Pictures with boxes as COCO stores them.

    Classes are numbered by ascending category id, whatever gaps these have, and keep the names of
    the file. Sample ids are image ids; where two files use the same ones, those of validation are
    shifted by 10**9 and those of test by 2 * 10**9. Pictures without annotations are background
    and stay. EXIF orientation is applied where the file gives the size of the turned picture.

    Args:
        folder: what the other paths are relative to.
        train: annotation file of the training stage.
        val: the same for validation; None holds a share of the training pictures out.
        test: the same for test.
        images: folder of the pictures, or one by stage, such as ``{"train": "train2017", ...}``.
        size: height and width of the canvas to which larger pictures are scaled down, or one number
            for both; the aspect is kept. None takes the largest height and width of all pictures.
        enlarge: also scale smaller pictures up to the canvas; else they lie in its upper left
            corner as they are.
        flips: mirror images that are still examples of their classes, ``none``, ``horizontal`` or
            ``both``; `augment` draws from them.
        bad_boxes: ``refuse`` stops at a box that is not finite, has no area or lies wholly outside
            of its picture; ``drop`` leaves such boxes out. Boxes that lie partly outside are
            clipped.
        val_fraction: expected share of the training pictures that is held out for a missing
            validation file, by a hash of the id.
        test_fraction: the same for a missing test file.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment,
            mixed_images: see `DetectionDataModule`.

    Attributes:
        category_ids: (C,) the ids of the file by class index; read with the data.

    Raises:
        MissingFileError: a file or folder that does not exist.
        DataError: a file that is damaged or contradicts itself or the other ones, or bad boxes.

    Reference:
        The format: Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014,
        arXiv 1405.0312.

    Example: ``CocoFolder("bccd", size=(240, 320), flips="both")``
    """

    def __init__(
        self,
        folder: str,
        train: str = "instances_train.json",
        val: str | None = "instances_val.json",
        test: str | None = "instances_test.json",
        images: str | dict[str, str] = "images",
        size: int | tuple[int, int] | None = None,
        enlarge: bool = False,
        flips: Flips = "horizontal",
        bad_boxes: BadBoxes = "refuse",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
        mixed_images: MixedImages = "filter",
    ) -> None:
        super().__init__(
            batch_size,
            seed,
            num_workers,
            view,
            shots,
            missing_classes,
            retain_fraction,
            augment,
            mixed_images,
        )
        check_fractions(val_fraction, test_fraction)
        check_flips(flips)
        check_bad_boxes(bad_boxes)
        if size is not None:
            canvas_of(size, np.ones((1, 2)))
        if not Path(folder).is_dir():
            raise MissingFileError(f"`folder` is '{folder}', which does not exist; check the path")
        self.folder = Path(folder)
        given: dict[Stage, str | None] = {"train": train, "val": val, "test": test}
        self.files: dict[Stage, Path] = {
            stage: self.folder / file for stage, file in given.items() if file is not None
        }
        self.images = self._image_folders(images)
        self._check_files()
        self.size = size if size is None or isinstance(size, int) else tuple(size)
        self.enlarge = enlarge
        self.flips: Flips = flips
        self.bad_boxes: BadBoxes = bad_boxes
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def _image_folders(self, images: str | Mapping[str, str]) -> dict[Stage, Path]:
        if isinstance(images, str):
            return dict.fromkeys(self.files, self.folder / images)
        for stage in images:
            if stage not in STAGES:
                raise DataError(f"`images` names the stage '{stage}', {suggest(stage, STAGES)}")
        for stage in self.files:
            if stage not in images:
                raise DataError(f"`images` names no folder for the stage '{stage}'; add it")
        return {stage: self.folder / images[stage] for stage in self.files}

    def _check_files(self) -> None:
        for stage, file in self.files.items():
            if not file.is_file():
                other = "" if stage == "train" else ", or null to hold pictures out of training"
                raise MissingFileError(
                    f"`{stage}` is '{file}', which does not exist; give the annotation file{other}"
                )
            if not self.images[stage].is_dir():
                raise MissingFileError(
                    f"`images` is '{self.images[stage]}', which does not exist; check the path"
                )

    @property
    def category_ids(self) -> tuple[int, ...]:
        """(C,) category ids of the annotation file by class index."""
        self._stage("train")  # reads the files
        return self._category_ids

    def build(self) -> dict[Stage, ImageDataset]:
        """Read the annotations; pictures are decoded when they are first asked for."""
        read = {stage: _read(file, self.images[stage]) for stage, file in self.files.items()}
        categories = read["train"].categories
        for one in read.values():
            if one.categories != categories:
                odd = sorted(set(one.categories.items()) ^ set(categories.items()))[0]
                raise DataError(
                    f"'{one.file}' and '{read['train'].file}' do not have the same categories, "
                    f"see {odd[0]} ('{odd[1]}'); give all files the same ones"
                )
        self._category_ids = tuple(sorted(categories))
        names = tuple(categories[number] for number in self._category_ids)
        sizes = {stage: one.sizes() for stage, one in read.items()}
        canvas = canvas_of(self.size, np.concatenate(list(sizes.values())))
        first = _first_ids(read)
        stages: dict[Stage, ImageDataset] = {
            stage: ScenePictures(
                f"{self.folder.name}/{one.file.name}/{canvas[0]}x{canvas[1]}",
                first[stage] + one.ids,
                one.boxes(self._category_ids),
                sizes[stage],
                names,
                _Opener(one.paths, sizes[stage]),
                canvas,
                self.enlarge,
                self.flips,
                self.bad_boxes,
            )
            for stage, one in read.items()
        }
        return complete(stages, self.val_fraction, self.test_fraction)


@dataclass(frozen=True)
class _File:
    """A checked annotation file.

    Attributes:
        file: where it is.
        categories: names by category id.
        ids: (N,) image ids.
        paths: (N,) pictures.
        given: (N, 2) heights and widths that the file gives, 0 where it gives none.
        annotations: as in the file.
    """

    file: Path
    categories: dict[int, str]
    ids: np.ndarray
    paths: list[Path]
    given: np.ndarray
    annotations: list[dict[str, Any]]

    def sizes(self) -> np.ndarray:
        """(N, 2) heights and widths; a picture is opened if the file does not say its own."""
        from PIL import Image

        sizes = self.given.copy()
        for row in np.flatnonzero((sizes < 1).any(axis=1)):
            try:
                with Image.open(self.paths[row]) as picture:
                    sizes[row] = picture.height, picture.width
            except OSError as error:
                raise DataError(
                    f"picture '{self.paths[row]}' cannot be read ({error}); replace or remove it"
                ) from error
        return sizes

    def boxes(self, category_ids: Sequence[int]) -> RawBoxes:
        """The annotations with class indices for category ids and rows for image ids."""
        place = {int(image): row for row, image in enumerate(self.ids)}
        index = {category: number for number, category in enumerate(category_ids)}
        marks = self.annotations

        def describe(row: int) -> str:
            image = marks[row]["image_id"]
            return (
                f"annotation {marks[row].get('id', f'number {row}')} of image {image} "
                f"('{self.paths[place[image]].name}') in '{self.file}'"
            )

        return RawBoxes(
            np.array([place[mark["image_id"]] for mark in marks], dtype=np.int64),
            xyxy(np.array([mark["bbox"] for mark in marks], dtype=np.float64).reshape(-1, 4)),
            np.array([index[mark["category_id"]] for mark in marks], dtype=np.int64),
            np.array([bool(mark.get("iscrowd", 0)) for mark in marks], dtype=bool),
            describe,
        )


def _read(file: Path, folder: Path) -> _File:
    """Read and check an annotation file."""
    content = _content(file)
    categories: dict[int, str] = {}
    for category in content["categories"]:
        number, name = _whole(category, "id", file, "category"), category.get("name")
        if number in categories:
            raise DataError(f"'{file}' has the category id {number} twice; renumber one of them")
        if not isinstance(name, str) or name in categories.values():
            raise DataError(
                f"category {number} in '{file}' has the name {name!r}, which is no text or taken; "
                "rename it"
            )
        categories[number] = name
    if not categories:
        raise DataError(f"'{file}' has no categories; a detector needs at least one class")
    marks = content["annotations"]
    annotated = _check_annotations(marks, categories, file)
    seen: set[int] = set()
    ids, paths, given, gone = [], [], [], []
    for image in content["images"]:
        number, name = _whole(image, "id", file, "image"), image.get("file_name")
        if number in seen:
            raise DataError(f"'{file}' has the image id {number} twice; renumber one of them")
        seen.add(number)
        if not isinstance(name, str):
            raise DataError(f"image {number} in '{file}' has no `file_name`; add it")
        path = folder / name
        if not path.is_file():
            if number in annotated:
                raise MissingFileError(
                    f"picture '{path}' of image {number} in '{file}' does not exist; check `images`"
                )
            gone.append(number)
            continue
        ids.append(number)
        paths.append(path)
        sides = (image.get("height"), image.get("width"))
        whole = [side for side in sides if isinstance(side, int) and side >= 1]
        given.append(whole if len(whole) == 2 else [0, 0])
    for number, mark in annotated.items():
        if number not in seen:
            raise DataError(
                f"annotation {mark} in '{file}' belongs to image {number}, which the file does not "
                "list; add the image or remove the annotation"
            )
    if gone:
        logger.warning(
            "'%s' lists %d images without annotations whose pictures do not exist, first %d; "
            "they are left out",
            file,
            len(gone),
            gone[0],
        )
    if not ids:
        raise DataError(f"'{file}' lists no images; a stage needs some")
    return _File(file, categories, np.array(ids, dtype=np.int64), paths, np.array(given), marks)


def _content(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"'{file}' is not valid JSON ({error}); restore it from its source"
        ) from error
    for key in ("images", "categories", "annotations"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(
                f"'{file}' has no list of objects `{key}`; it must be an annotation file of COCO's "
                "format with `images`, `categories` and `annotations`"
            )
    return content


def _whole(row: Mapping[str, Any], key: str, file: Path, kind: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**62:
        raise DataError(
            f"'{file}' has {'an' if kind[0] in 'ai' else 'a'} {kind} whose `{key}` is {value!r}; "
            "it must be a whole number"
        )
    return value


def _check_annotations(
    marks: Sequence[Mapping[str, Any]], categories: Mapping[int, str], file: Path
) -> dict[int, Any]:
    """Refuse malformed annotations; returns the first annotation by image id."""
    ids: set[Any] = set()
    annotated: dict[int, Any] = {}
    for row, mark in enumerate(marks):
        name: Any = f"number {row}"
        if "id" in mark:
            name = _whole(mark, "id", file, "annotation")
        if name in ids:
            raise DataError(f"'{file}' has the annotation id {name} twice; renumber one of them")
        ids.add(name)
        annotated.setdefault(_whole(mark, "image_id", file, "annotation"), name)
        category = mark.get("category_id")
        if not isinstance(category, int) or category not in categories:
            raise DataError(
                f"annotation {name} in '{file}' has the category id {category}, "
                f"{suggest(category, sorted(categories))}"
            )
        box = mark.get("bbox")
        numbers = isinstance(box, list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in box
        )
        if not numbers or len(box or ()) != 4:
            raise DataError(
                f"annotation {name} in '{file}' has the `bbox` {box}; it must be four numbers: "
                "left, top, width and height in pixels"
            )
    return annotated


def _first_ids(read: Mapping[Stage, _File]) -> dict[Stage, int]:
    """What is added to the image ids of each stage so that no two stages share one."""

    def together(shift: Mapping[Stage, int]) -> bool:
        shifted = np.concatenate([one.ids + shift[stage] for stage, one in read.items()])
        return len(np.unique(shifted)) == len(shifted)

    for shift in (dict.fromkeys(STAGE_IDS, 0), STAGE_IDS):
        if together(shift):
            return shift
    raise DataError(
        f"'{read['train'].file}' and the files of the other stages use the same image ids, some "
        "above 10**9; renumber the images of one of them"
    )


class _Opener:
    """Opens the pictures of rows; a class, so that loader workers can be sent it."""

    def __init__(self, paths: list[Path], sizes: np.ndarray) -> None:
        self._paths, self._sizes = paths, sizes

    def __call__(self, rows: Sequence[int]) -> Iterator[Image]:
        from PIL import Image

        for row in rows:
            with Image.open(self._paths[row]) as picture:
                given = tuple(self._sizes[row].tolist())
                stored = (picture.height, picture.width)
                turn = stored != given and upright_size(picture) == given
                yield upright(picture) if turn else picture
