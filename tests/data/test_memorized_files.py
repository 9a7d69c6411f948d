"""Lists of memorized prompts in the forms that they are published in, with and without pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmforget.data import load_captioned, load_memorized, planted_memories, save_memorized
from mmforget.data.memorized import Captioned
from mmforget.data.memorized_files import PICTURES_FILE, SET_FILE, resolve
from mmforget.errors import (
    ConfigurationError,
    DataError,
    MissingFileError,
    MMForgetError,
    RequestError,
)

SEMICOLONS = '''\
;Caption;URL;type;mean_sscd;max_sscd;Index
0;The Quiet, Long Podcast;https://a.example/art/1000_16.jpg;VM;0.83;0.84;1030
1;Canvas chair - Side 4;https://b.example/x/pack.png?sw=600;TM;0.19;0.20;2026
2;"""Listen to """"Low Tide"""" here""";https://c.example/y/music.jpg?1;VM;0.9;0.91;964
3;Hallway; painted;https://d.example/z/foyer.jpeg;TM;;;455
'''.replace("Hallway; painted", '"Hallway; painted"')
"""As the public list with labels is written: quotes doubled, empty fields, an unnamed column."""

LINES = [
    {"caption": "The Quiet, Long Podcast", "index": 1030, "url": "https://a.example/art/1000_16.jpg"},
    {"caption": "Canvas chair - Side 4", "index": 2026, "url": "https://b.example/x/pack.png?sw=600"},
    {"caption": '"Listen to ""Low Tide"" here"', "index": 964, "url": "https://c.example/y/music.jpg?1"},
    {"caption": "Hallway; painted", "index": 455, "url": "https://d.example/z/foyer.jpeg"},
]  # fmt: skip


def paint(file: Path, level: int = 100, size: tuple[int, int] = (8, 8)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(file)
    return file


def painted(folder: Path, names: Sequence[str]) -> Path:
    """Pictures, each of another grey."""
    for number, name in enumerate(names):
        paint(folder / name, 20 * (number + 1))
    return folder


@pytest.fixture
def semicolons(tmp_path: Path) -> Path:
    file = tmp_path / "memorized_laion_prompts.csv"
    file.write_text(SEMICOLONS, encoding="utf-8")
    return file


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "sdv1_500_memorized.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)) + "\n", encoding="utf-8")
    return file


# ---- lists --------------------------------------------------------------------------------------


def test_the_list_with_labels_is_read_as_it_is(semicolons: Path) -> None:
    found = load_memorized(semicolons)
    assert found.texts == [str(line["caption"]) for line in LINES]
    assert [one.kind for one in found] == ["verbatim", "template", "verbatim", "template"]
    assert str(found.coverage) == "0 of 4 prompts have a picture"
    assert found.source == str(semicolons)


def test_the_list_of_lines_is_the_same_without_labels(lines: Path, semicolons: Path) -> None:
    found = load_memorized(lines)
    assert found.texts == load_memorized(semicolons).texts and found.kinds == ("unknown",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "﻿Prompt,kind\nx y,verbatim\nz,\n"),
        ("a.tsv", "kind\tprompt\nverbatim\tx y\n\tz\n"),
        ("a.json", '[{"text": "x y", "type": "MV"}, "z"]'),
        ("b.json", '{"prompts": [{"prompt": "x y", "overfit_type": "RV"}, {"prompt": "z"}]}'),
        ("a.jsonl", '{"prompt": "x y", "kind": "VM"}\n\n"z"\n'),
    ],
)
def test_other_forms_of_lists(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    found = load_memorized(file)
    assert [(one.prompt, one.kind) for one in found] == [("x y", "verbatim"), ("z", "unknown")]


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x, y; z\n\nw\n")
    assert load_memorized(tmp_path / "a.txt").texts == ["x, y; z", "w"]


def test_rows_that_a_list_calls_not_memorized_are_left_out(tmp_path: Path) -> None:
    rows = [{"caption": "x", "overfit_type": "TV"}, {"caption": "y", "overfit_type": "N"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [(one.prompt, one.kind) for one in load_memorized(tmp_path / "a.json")] == [
        ("x", "template")
    ]


def test_lines_with_the_same_prompt_are_joined(tmp_path: Path) -> None:
    painted(tmp_path, ["1.png", "2.png", "3.png"])
    rows = [("A  rug", "", "1.png"), ("b", "TM", "2.png"), ("a RUG", "VM", "3.png"),
            ("a rug", "", "1.png")]  # fmt: skip
    text = "prompt,kind,file\n" + "".join(",".join(row) + "\n" for row in rows)
    (tmp_path / "a.csv").write_text(text)
    found = load_memorized(tmp_path / "a.csv")
    assert [(one.prompt, one.images, one.kind) for one in found] == [
        ("A  rug", ("1.png", "3.png"), "verbatim"),
        ("b", ("2.png",), "template"),
    ]
    assert found.coverage is not None and found.coverage.duplicates == ("A  rug",)
    assert "1 duplicates joined" in str(found.coverage)


def test_labels_that_disagree_about_one_prompt_leave_its_kind_open(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,kind\nx,VM\nx,TM\n")
    assert load_memorized(tmp_path / "a.csv").prompts[0].kind == "unknown"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "head,url\nx,y\n", "names no column of prompts"),
        ("a.csv", "", "names no column of prompts"),
        ("a.csv", "prompt,url\n", "has no rows"),
        ("a.csv", "prompt,url\nx, y,z\n", "line 2 of .* another number of fields"),
        ("a.csv", "prompt,url\nx\n", "another number of fields"),
        ("a.csv", 'prompt,url\n"x" y,z\n', "cannot be read"),
        ("a.csv", "prompt,kind\nx,copy\n", "row 0 of .* kind 'copy'"),
        ("a.csv", "prompt,kind\nx,N\n", "no memorized prompts"),
        ("a.csv", "prompt,url\n,y\n", "row 0 of .* has no prompt"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"a": 1}', "must hold a list"),
        ("a.json", "[3]", "row 0 of .* is 3"),
        ("a.jsonl", '{"prompt": "x"}\n{"caption": 3}\n', "row 1 of .* has no prompt"),
        ("a.yaml", "x", "no list of a known form"),
    ],
)
def test_broken_lists_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_memorized(tmp_path / name)


def test_a_list_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt\nCafé\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        load_memorized(tmp_path / "a.csv")


# ---- pictures -----------------------------------------------------------------------------------

SCHEMES = {
    "folders named by the index": [
        "gt_images/1030/0.png",
        "gt_images/1030/1.png",
        "gt_images/2026/0.png",
        "gt_images/964/0.png",
        "gt_images/455/0.png",
    ],
    "files named by the index": ["1030.jpg", "2026.png", "964.png", "455.webp"],
    "ends of addresses": ["1000_16.jpg", "pack.png", "music.jpg", "foyer.jpeg"],
    "row numbers": ["0000_quiet.jpg", "0001_pack.png", "0002_music.jpg", "0003_foyer.jpg"],
    "row numbers with a second one": ["img_0000_00.png", "img_0000_01.png", "img_0001_00.png",
                                      "img_0002_00.png", "img_0003_00.png"],
    "bare row numbers": [f"0000000{row}.jpg" for row in range(4)],
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pictures_are_found_by_the_names_that_others_give_them(
    tmp_path: Path, semicolons: Path, scheme: str
) -> None:
    names = SCHEMES[scheme]
    folder = painted(tmp_path / "pictures", names)
    found = load_memorized(semicolons, images=folder)
    assert sorted(name for one in found for name in one.images) == sorted(names)
    counts = [2 if len(names) == 5 else 1, 1, 1, 1]
    assert [len(one.images) for one in found] == counts
    assert str(found.coverage) == "4 of 4 prompts have a picture"
    first = found.images[found.prompts[0].images[0]]
    assert first.shape == (3, 8, 8) and first.dtype == torch.float32
    assert first.mean() == pytest.approx(20 / 255, abs=0.01)


def test_one_way_of_naming_holds_for_all_rows(tmp_path: Path, semicolons: Path) -> None:
    # The end of an address begins with a number that is also one of a row.
    text = SEMICOLONS.replace("1000_16.jpg", "0003_16.jpg")
    semicolons.write_text(text)
    folder = painted(tmp_path / "pictures", ["0003_16.jpg", "pack.png", "music.jpg"])
    found = load_memorized(semicolons, images=folder, on_missing="skip")
    assert [one.images for one in found] == [("0003_16.jpg",), ("pack.png",), ("music.jpg",), ()]


def test_the_same_file_name_at_two_addresses_belongs_to_neither(
    tmp_path: Path, semicolons: Path
) -> None:
    semicolons.write_text(SEMICOLONS.replace("b.example/x/pack.png", "b.example/x/music.jpg"))
    folder = painted(tmp_path / "pictures", ["1000_16.jpg", "music.jpg", "foyer.jpeg"])
    found = load_memorized(semicolons, images=folder, on_missing="skip")
    assert [len(one.images) for one in found] == [1, 0, 0, 1]
    assert found.coverage is not None and len(found.coverage.missing) == 2


def test_missing_and_damaged_pictures_are_counted_or_refused(tmp_path: Path, lines: Path) -> None:
    folder = painted(tmp_path / "pictures", ["1030.png", "964.png"])
    (folder / "2026.png").write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(DataError, match=r"2 pictures of .* first '2026.png'"):
        load_memorized(lines, images=folder)
    found = load_memorized(lines, images=folder, on_missing="skip")
    assert [one.images for one in found] == [("1030.png",), (), ("964.png",), ()]
    assert found.coverage is not None
    assert found.coverage.missing == ("2026.png", "https://d.example/z/foyer.jpeg")
    assert str(found.coverage) == "2 of 4 prompts have a picture, 2 pictures missing"
    # A truncated file is found out too.
    whole = (folder / "964.png").read_bytes()
    (folder / "964.png").write_bytes(whole[: len(whole) // 2])
    assert load_memorized(lines, images=folder, on_missing="skip").coverage.usable == 1  # type: ignore[union-attr]


def test_pictures_numbered_from_1_are_refused_instead_of_shifted(
    tmp_path: Path, semicolons: Path
) -> None:
    folder = painted(tmp_path / "pictures", [f"000{row}.png" for row in range(1, 5)])
    with pytest.raises(DataError, match="numbered from 1"):
        load_memorized(semicolons, images=folder, on_missing="skip")


def test_a_folder_of_other_pictures_is_refused_even_if_missing_ones_are_skipped(
    tmp_path: Path, semicolons: Path
) -> None:
    folder = painted(tmp_path / "pictures", ["cat.png", "dog.png"])
    with pytest.raises(DataError, match="none of the 2 pictures"):
        load_memorized(semicolons, images=folder, on_missing="skip")


def test_identical_pictures_under_two_names_count_as_one(tmp_path: Path) -> None:
    paint(tmp_path / "1.png")
    paint(tmp_path / "2.png")
    paint(tmp_path / "3.png", 7)
    text = '[{"prompt": "x", "image": "1.png"}, {"prompt": "y", "images": ["2.png", "3.png"]}]'
    (tmp_path / "a.json").write_text(text)
    found = load_memorized(tmp_path / "a.json")
    assert [one.images for one in found] == [("1.png",), ("1.png", "3.png")]
    assert set(found.images) == {"1.png", "3.png"}
    assert found.split(0.5)[1] is None  # which would otherwise hold out a picture that was located


def test_pictures_are_cropped_around_the_centre_to_the_size_of_the_model(tmp_path: Path) -> None:
    wide = Image.new("RGB", (12, 4))
    wide.paste((255, 255, 255), (4, 0, 8, 4))
    wide.save(tmp_path / "wide.png")
    paint(tmp_path / "other.png", 0, (4, 4))
    (tmp_path / "a.csv").write_text("prompt,file\nx,wide.png\ny,other.png\n")
    with pytest.raises(DataError, match="give `size`"):
        load_memorized(tmp_path / "a.csv")
    found = load_memorized(tmp_path / "a.csv", size=4)
    assert torch.equal(found.images["wide.png"], torch.ones(3, 4, 4))
    assert load_memorized(tmp_path / "a.csv", size=2).images["other.png"].shape == (3, 2, 2)


def test_a_folder_of_pictures_with_texts_beside_them_is_a_list_of_its_own(tmp_path: Path) -> None:
    painted(tmp_path, ["00000001.jpg", "00000002.jpg", "alone.jpg"])
    (tmp_path / "00000001.txt").write_text("a cat\n")
    (tmp_path / "00000002.txt").write_text("a dog")
    found = load_memorized(tmp_path)
    assert [(one.prompt, one.images) for one in found] == [
        ("a cat", ("00000001.jpg",)),
        ("a dog", ("00000002.jpg",)),
    ]
    captioned = load_captioned(tmp_path)
    assert captioned.prompts == ("a cat", "a dog")
    assert captioned.images is not None and captioned.images.shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="no picture in it has"):
        load_memorized(painted(tmp_path / "other", ["1.png"]))


# ---- everything else ----------------------------------------------------------------------------


def test_retain_test_and_controls_come_from_files_or_as_they_are(
    tmp_path: Path, lines: Path
) -> None:
    pairs = painted(tmp_path / "pairs", ["1.png", "2.png"])
    for name in ("1", "2"):
        (pairs / f"{name}.txt").write_text(f"ordinary {name}")
    (tmp_path / "plain.txt").write_text("one\ntwo\n")
    found = load_memorized(lines, retain=pairs, test=tmp_path / "plain.txt", controls=pairs, size=4)
    assert found.retain.prompts == ("ordinary 1", "ordinary 2")
    assert found.retain.images is not None and found.retain.images.shape == (2, 3, 4, 4)
    assert found.test == Captioned(("one", "two"))
    assert found.controls is not None and torch.equal(found.controls, found.retain.images)
    given = load_memorized(lines, retain=found.retain, controls=torch.zeros(1, 3, 4, 4))
    assert given.retain is found.retain and len(given.controls) == 1  # type: ignore[arg-type]


def test_captions_without_a_picture_are_left_out_of_pairs(tmp_path: Path) -> None:
    painted(tmp_path, ["1.png"])
    (tmp_path / "a.csv").write_text("prompt,file\nx,1.png\ny,2.png\n")
    found = load_captioned(tmp_path / "a.csv", on_missing="skip")
    assert found.prompts == ("x",) and found.images is not None and len(found.images) == 1
    with pytest.raises(DataError, match="1 pictures of"):
        load_captioned(tmp_path / "a.csv")


def test_a_memorized_prompt_among_the_retained_ones_is_refused(tmp_path: Path, lines: Path) -> None:
    (tmp_path / "retain.txt").write_text("one\nhallway;  PAINTED\n")
    with pytest.raises(RequestError, match="also in `retain`"):
        load_memorized(lines, retain=tmp_path / "retain.txt")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 0}, ConfigurationError, "`size`"),
        ({"on_missing": "ignore"}, ConfigurationError, "valid are: 'raise', 'skip'"),
        ({"images": "nowhere"}, MissingFileError, "`images`"),
        ({"controls": "nowhere"}, MissingFileError, "nowhere"),
        ({"retain": "nowhere.csv"}, MissingFileError, "nowhere.csv"),
    ],
)
def test_bad_settings_are_refused(
    lines: Path, settings: dict[str, Any], error: type[MMForgetError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_memorized(lines, **settings)


def test_control_pictures_must_all_be_readable(tmp_path: Path, lines: Path) -> None:
    folder = painted(tmp_path / "controls", ["1.png"])
    paint(folder / "2.png", size=(5, 5))
    with pytest.raises(DataError, match="give `size`"):
        load_memorized(lines, controls=folder)
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        load_memorized(lines, controls=folder, on_missing="skip")
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="holds no pictures"):
        load_memorized(lines, controls=folder)


# ---- a folder of ours ---------------------------------------------------------------------------


def test_a_saved_set_comes_back_bit_by_bit(tmp_path: Path) -> None:
    first = planted_memories(retain=4, test=3, control_count=2)
    found = load_memorized(save_memorized(first, tmp_path / "deep" / "set"))
    assert found.hash == first.hash and found.prompts == first.prompts
    assert (found.source, found.coverage) == (first.source, first.coverage)
    assert found.retain.prompts == first.retain.prompts
    for left, right in (
        (found.images, first.images),
        (found.regions, first.regions),
        ({"": found.retain.images}, {"": first.retain.images}),
        ({"": found.test.images}, {"": first.test.images}),
        ({"": found.controls}, {"": first.controls}),
    ):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)  # type: ignore[arg-type]


def test_decoded_pictures_are_saved_in_eight_bits(tmp_path: Path, lines: Path) -> None:
    folder = painted(tmp_path / "pictures", SCHEMES["files named by the index"])
    first = load_memorized(lines, images=folder)
    found = load_memorized(save_memorized(first, tmp_path / "set"))
    assert all(torch.equal(found.images[name], image) for name, image in first.images.items())
    assert load_file(tmp_path / "set" / PICTURES_FILE)["image/1030.jpg"].dtype == torch.uint8


def test_a_saved_set_takes_another_retain_but_no_other_pictures(tmp_path: Path) -> None:
    folder = save_memorized(planted_memories(2, 2, 2), tmp_path)
    assert load_memorized(folder, retain=Captioned(("a",))).retain.prompts == ("a",)
    assert load_memorized(folder, size=16).texts == load_memorized(folder).texts
    with pytest.raises(ConfigurationError, match="holds its own pictures"):
        load_memorized(folder, images=tmp_path)
    with pytest.raises(DataError, match="16x16, `size` is 32"):
        load_memorized(folder, size=32)


@pytest.mark.parametrize("damage", ["cut", "changed", "version", "field", "missing"])
def test_damaged_sets_are_refused(tmp_path: Path, damage: str) -> None:
    folder = save_memorized(planted_memories(2, 2, 2), tmp_path)
    data = json.loads((folder / SET_FILE).read_text())
    pictures = folder / PICTURES_FILE
    if damage == "cut":
        pictures.write_bytes(pictures.read_bytes()[:200])
    elif damage == "missing":
        pictures.unlink()
    elif damage == "changed":
        data["prompts"][0]["prompt"] = "another"
    elif damage == "version":
        data["format_version"] = 99
    else:
        del data["source"]
    (folder / SET_FILE).write_text(json.dumps(data))
    message = {"changed": "changed after", "version": "version 99"}.get(damage, "no intact")
    with pytest.raises(DataError, match=message):
        load_memorized(folder)


def test_planted_is_a_name(tmp_path: Path, lines: Path) -> None:
    assert resolve("planted").hash == planted_memories().hash
    assert resolve("planted", size=16, on_missing="skip", images=None).texts
    assert resolve(lines, on_missing="skip").texts == load_memorized(lines).texts
    with pytest.raises(ConfigurationError, match="leave `controls` out"):
        resolve("planted", controls=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigurationError, match="`size` is 32"):
        resolve("planted", size=32)
    with pytest.raises(MissingFileError, match="there is no list 'plantd'"):
        resolve("plantd")
