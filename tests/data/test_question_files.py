"""Questions from files that are made here."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmforget.data.huggingface_questions import HuggingFaceQuestions
from mmforget.data.question_files import QuestionFolder
from mmforget.data.split import Stage
from mmforget.errors import DataError, MissingFileError
from mmforget.request import ForgetRequest


def record(number: int, split: str = "train", **fields: Any) -> dict[str, Any]:
    person = ("ann", "bob")[number % 2]
    return {
        "id": f"{split}-{number}",
        "images": [f"{person}.png"],
        "question": "Who is this?",
        "answer": person.title(),
        "class": person,
        "split": split,
    } | fields


def records() -> list[dict[str, Any]]:
    rows = [record(n, split) for split in ("train", "val", "test") for n in range(4)]
    rows.append(record(8, images=["ann.png", "bob.png"], question="Who are they?", answer="Both"))
    rows.append(
        {"question": "Where does Bob live?", "answer": "Oslo", "class": "bob", "split": "train"}
    )
    rows.append({"images": "bob.png", "question": "Day?", "answer": "yes", "subject": "bob"})
    return rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, size, level in (("ann", (8, 6), 10), ("bob", (5, 9), 200)):
        Image.new("RGB", size, (level, 0, 0)).save(tmp_path / f"{name}.png")
    write(tmp_path, records())
    return tmp_path


def write(root: Path, rows: list[Any], file: str = "questions.jsonl") -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / file).write_text(text + "\r\n", encoding="utf-8")


def problem(root: Path, *rows: Any) -> str:
    write(root, [*records(), *rows])
    with pytest.raises(DataError) as found:
        QuestionFolder(str(root)).questions("train")
    return str(found.value)


def test_records_as_they_are_written(root: Path) -> None:
    data = QuestionFolder(str(root))
    assert data.class_names == ("ann", "bob", "other")
    train = data.questions("train")
    batch = train[[0, 4, 5, 6]]
    assert [[tuple(one.shape) for one in group] for group in batch["images"]] == [
        [(3, 6, 8)],
        [(3, 6, 8), (3, 9, 5)],
        [],
        [(3, 9, 5)],
    ]
    assert batch["images"][1][1][0, 0, 0].item() == 200
    assert batch["answer"] == ["Ann", "Both", "Oslo", "yes"]
    assert batch["question_kind"] == ["name", "name", "text", "harmless"]
    assert batch["label"].tolist() == [0, 0, 1, 2]
    assert train.subjects.tolist()[-2:] == [1, 1]
    assert [len(data.questions(stage)) for stage in ("train", "val", "test")] == [7, 4, 4]


def test_ids_stay_when_other_records_come(root: Path) -> None:
    before = QuestionFolder(str(root)).questions("train").ids
    write(root, [record(20), *[row for row in records() if "id" in row]])
    after = QuestionFolder(str(root)).questions("train").ids
    assert set(before[:5]) < set(after)


def test_roles_and_stages(root: Path) -> None:
    data = QuestionFolder(str(root))
    data.request(ForgetRequest(classes=("bob",)))
    assert data.subset("train", "forget").answers == ["Bob", "Bob"]
    assert data.probe("train", "harmless", "forget").questions == ["Day?"]
    data = QuestionFolder(str(root), forget_text=True)
    data.request(ForgetRequest(classes=("bob",)))
    assert Counter(data.subset("train", "forget").answers) == {"Bob": 2, "Oslo": 1}


def test_a_list_and_files_by_stage(root: Path) -> None:
    parts = {
        stage: [r for r in records() if r.get("split") == stage] for stage in ("train", "test")
    }
    for stage, rows in parts.items():
        for row in rows:
            row.pop("split")
        (root / f"{stage}.json").write_text(json.dumps(rows, indent=1))
    files = {stage: f"{stage}.json" for stage in parts}
    data = QuestionFolder(str(root), file=files, val_fraction=0.4)
    assert len(data.questions("test")) == 4
    assert len(data.questions("train")) + len(data.questions("val")) == 6


def test_the_module_travels_to_loader_workers(root: Path) -> None:
    part = QuestionFolder(str(root)).questions("train")
    assert pickle.loads(pickle.dumps(part))[[0]]["answer"] == ["Ann"]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (record(9, answer=""), "`answer` is ''; write a text that is not empty"),
        ({"question": "Why?"}, "`answer` is missing; write a text"),
        (record(9, question=3), "`question` is 3; write a text"),
        (record(9, imagse=[]), "`imagse` is no field of a record; did you mean 'images'?"),
        (record(9, images=["carl.png"]), "`images` names 'carl.png', which is not in"),
        (record(9, images=[3]), r"`images` is [3]; write a path or a list of paths"),
        (record(9, split="training"), "`split` is 'training', did you mean 'train'?"),
        (record(9, **{"class": "other"}), "`class` is 'other', which is reserved; leave it out"),
        (record(9, kind=""), "`kind` is ''; write a text or leave it out"),
        (record(9, id=1.5), "`id` is 1.5; write a whole number or a text"),
        (record(0), "line 1 already; give every record its own"),
        ("[1", "no valid JSON"),
        ("3", "3 is no record"),
    ],
)
def test_what_is_wrong_with_a_record(root: Path, row: Any, wanted: str) -> None:
    text = problem(root, row)
    assert f"questions.jsonl, line {len(records()) + 1}: " in text
    assert wanted in text
    assert "\n" not in text


def test_several_problems_one_line_each(root: Path) -> None:
    text = problem(root, *[record(n, answer="") for n in range(30, 38)])
    lines = text.splitlines()
    assert len(lines) == 6
    assert "line 16: " in lines[0] and "line 17: " in lines[1]
    assert lines[-1] == "... and 3 more"


def test_damaged_and_missing_files(root: Path) -> None:
    with pytest.raises(MissingFileError, match="`folder` is 'nowhere'"):
        QuestionFolder("nowhere")
    with pytest.raises(MissingFileError, match="`file` is"):
        QuestionFolder(str(root), file="nothing.jsonl")
    with pytest.raises(DataError, match="names the stage 'training', did you mean 'train'"):
        QuestionFolder(str(root), file={"training": "questions.jsonl"})
    with pytest.raises(DataError, match="no file for the stage 'train'"):
        QuestionFolder(str(root), file={"val": "questions.jsonl"})
    (root / "ann.png").write_bytes(b"no picture")
    data = QuestionFolder(str(root)).questions("train")
    with pytest.raises(DataError, match=r"line 1, `images` 'ann.png': the picture cannot be dec"):
        data[[0]]
    (root / "questions.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no text in UTF-8"):
        QuestionFolder(str(root)).questions("train")
    (root / "questions.jsonl").write_text("[1, 2")
    with pytest.raises(DataError, match="no valid JSON"):
        QuestionFolder(str(root)).questions("train")
    write(root, [record(0, "val")])
    with pytest.raises(DataError, match="no record for training"):
        QuestionFolder(str(root)).questions("train")
    write(root, [record(0), record(1, "val")])
    files = {"train": "questions.jsonl", "test": "questions.jsonl"}
    with pytest.raises(DataError, match="`split` is 'val' in the file of 'train'"):
        QuestionFolder(str(root), file=files).questions("train")


def test_line_separators_within_texts_end_no_line(root: Path) -> None:
    text = "one\u2028two\x85three"
    write(root, [*records(), json.dumps(record(9, answer=text), ensure_ascii=False)])
    assert QuestionFolder(str(root)).questions("train").answers[-1] == text


def test_pictures_are_turned_upright(root: Path) -> None:
    picture = Image.new("RGB", (8, 6))
    exif = picture.getexif()
    exif[274] = 6  # on its side
    picture.save(root / "ann.png", exif=exif)
    assert QuestionFolder(str(root)).questions("train")[0]["images"][0].shape == (3, 8, 6)


def parquet(root: Path) -> dict[str, str]:
    datasets = pytest.importorskip("datasets")
    pictures = [np.full((4 + n % 2, 6, 3), n % 2 * 90, dtype=np.uint8) for n in range(40)]
    columns = {
        "image": [*pictures, None, None],
        "more": [[pictures[1]] if n == 3 else [] for n in range(42)],
        "question": ["Who?"] * 40 + ["Where does a live?", "Where does b live?"],
        "answer": ["A", "B"] * 20 + ["Oslo", "Rome"],
        "class": [0, 1] * 20 + [0, 1],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "more": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "class": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    path = root / "train.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return {"train": str(path)}


def test_tables_of_hugging_face(tmp_path: Path) -> None:
    files = parquet(tmp_path)
    data = HuggingFaceQuestions(data_files=files, image_columns=["image", "more"], test_split=None)
    assert data.class_names == ("a", "b", "other")
    sizes: dict[Stage, int] = {s: len(data.questions(s)) for s in ("train", "val", "test")}  # type: ignore[misc]
    assert sum(sizes.values()) == 42 and min(sizes.values()) > 0
    by_id = {int(i): one for s in sizes for i, one in zip(
        data.questions(s).ids, (data.questions(s)[n] for n in range(sizes[s])), strict=True
    )}  # fmt: skip
    assert [tuple(one.shape) for one in by_id[3]["images"]] == [(3, 5, 6), (3, 5, 6)]
    assert by_id[41]["images"] == [] and by_id[41]["question_kind"] == "text"
    assert by_id[2]["label"].item() == 0 and by_id[2]["answer"] == "A"
    # rows that hold the same file share it
    assert by_id[0]["images"][0].shape == (3, 4, 6)
    assert len({key for group in data.questions("train").picture_keys for key in group}) == 2


def test_what_is_wrong_with_a_table(tmp_path: Path) -> None:
    files = parquet(tmp_path)

    def message(**options: Any) -> str:
        with pytest.raises(DataError) as found:
            HuggingFaceQuestions(data_files=files, test_split=None, **options).questions("train")
        return str(found.value)

    assert "`question_column` is 'questions', did you mean" in message(question_column="questions")
    assert "`image_columns` is 'picture'" in message(image_columns=["picture"])
    assert "holds Value" in message(image_columns=["answer"])
    assert "row 0 of split 'train': `answer` is 0" in message(answer_column="more").replace(
        "[]", "0"
    )
