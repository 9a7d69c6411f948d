"""Memorized sets: which prompt brings back which picture, splits, and the planted sheets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.data.memorized import Captioned, Coverage, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import (
    SHEET,
    TILE,
    controls,
    draw_sheets,
    fresh_tiles,
    ordinary,
    planted,
    planted_memories,
)
from mmforget.errors import DataError, MMForgetError, RequestError


def picture(value: float = 0.5) -> Tensor:
    return torch.full((3, 4, 4), value)


def linked(*links: str, kinds: str = "") -> MemorizedSet:
    """Prompts ``p0``, ``p1`` ...; each text names the pictures of one, letter by letter."""
    marks = {"v": "verbatim", "t": "template"}
    prompts = tuple(
        MemorizedPrompt(f"p{row}", tuple(names), marks[kinds[row]] if kinds else "unknown")  # type: ignore[arg-type]
        for row, names in enumerate(links)
    )
    letters = sorted({letter for names in links for letter in names})
    return MemorizedSet(prompts, {name: picture(i / 9) for i, name in enumerate(letters)})


# ---- the relation -------------------------------------------------------------------------------


def test_several_prompts_may_share_a_picture_and_one_prompt_may_have_several() -> None:
    found = linked("ab", "b", "")
    assert [one.images for one in found] == [("a", "b"), ("b",), ()]
    assert len(found) == 3 and found.texts == ["p0", "p1", "p2"]
    assert str(found.coverage) == "2 of 3 prompts have a picture"


def test_only_keeps_the_pictures_and_regions_of_the_chosen_prompts() -> None:
    region = torch.ones(4, 4, dtype=torch.bool)
    found = replace(linked("ab", "c"), regions={"a": region, "c": region}).only([1])
    assert found.texts == ["p1"] and set(found.images) == {"c"} == set(found.regions)
    assert found.coverage == Coverage(1, 1)


def test_the_coverage_tells_what_is_missing_and_what_was_joined() -> None:
    text = str(Coverage(5, 3, missing=("x", "y"), duplicates=("p",)))
    assert text == "3 of 5 prompts have a picture, 2 pictures missing, 1 duplicates joined"


def test_kinds_are_kept_apart() -> None:
    found = linked("a", "b", "c", kinds="vtv")
    assert found.kinds == ("verbatim", "template")
    assert found.of_kind("verbatim").texts == ["p0", "p2"]
    with pytest.raises(RequestError, match="no memorized prompts"):
        found.of_kind("unknown")


def test_the_request_has_one_memorized_concept_per_prompt() -> None:
    request = linked("a", "b").request
    assert request.name == "forget-2-memorized-prompts"
    assert [(c.target, c.kind) for c in request.concepts] == [
        ("p0", "memorized"),
        ("p1", "memorized"),
    ]
    assert linked("a").request.name == "forget-1-memorized-prompt"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MemorizedPrompt("  "), RequestError, "give the text"),
        (lambda: MemorizedPrompt("a", (), "copy"), RequestError, "valid are: 'verbatim'"),  # type: ignore[arg-type]
        (lambda: MemorizedSet(()), RequestError, "give at least one"),
        (
            lambda: MemorizedSet((MemorizedPrompt("A cat"), MemorizedPrompt("a  CAT"))),
            RequestError,
            "'a  CAT' twice",
        ),
        (lambda: MemorizedSet((MemorizedPrompt("a", ("x",)),)), DataError, "picture 'x'"),
        (
            lambda: MemorizedSet((MemorizedPrompt("a"),), retain=Captioned(("b", "A"))),
            RequestError,
            "also in `retain`",
        ),
        (
            lambda: MemorizedSet((MemorizedPrompt("a"),), test=Captioned(("a",))),
            RequestError,
            "also in `test`",
        ),
        (lambda: MemorizedSet((MemorizedPrompt("a"),), {"x": torch.ones(4, 4)}), DataError, "'x'"),
        (
            lambda: MemorizedSet(
                (MemorizedPrompt("a"),), {"x": torch.ones(3, 4, 4, dtype=torch.uint8)}
            ),
            DataError,
            "float in",
        ),
        (lambda: Captioned(("a", "b"), torch.ones(1, 3, 4, 4)), DataError, "2 captions but 1"),
    ],
)
def test_bad_sets_are_refused(make: Any, error: type[MMForgetError], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "region",
    [
        torch.zeros(4, 4, dtype=torch.bool),
        torch.ones(4, 4),
        torch.ones(3, 4, dtype=torch.bool),
    ],
)
def test_a_region_must_be_a_mask_of_the_size_of_its_picture_with_something_in_it(
    region: Tensor,
) -> None:
    with pytest.raises(DataError, match="the region of 'x'"):
        MemorizedSet((MemorizedPrompt("a", ("x",)),), {"x": picture()}, {"x": region})


# ---- splits -------------------------------------------------------------------------------------


def test_a_split_parts_the_prompts_of_every_kind() -> None:
    found = linked(*"abcdefgh", kinds="vvvvtttt")
    first, rest = found.split(0.5, seed=3)
    assert rest is not None
    assert sorted(first.texts + rest.texts) == sorted(found.texts)
    for part in (first, rest):
        assert sorted(one.kind for one in part) == ["template"] * 2 + ["verbatim"] * 2
    assert found.split(0.5, seed=3)[0].texts == first.texts
    assert any(found.split(0.5, seed=seed)[0].texts != first.texts for seed in range(5))


@pytest.mark.parametrize("seed", range(8))
def test_prompts_that_share_a_picture_stay_together(seed: int) -> None:
    # p0, p2 and p4 are connected by way of p2, though p0 and p4 share nothing.
    found = linked("a", "x", "ab", "y", "b", "z")
    first, rest = found.split(0.5, seed=seed)
    assert rest is not None
    assert not set(first.images) & set(rest.images)
    together = {"p0", "p2", "p4"}
    assert together <= set(first.texts) or together <= set(rest.texts)


def test_the_whole_share_leaves_nothing_and_a_share_out_of_range_is_refused() -> None:
    found = linked("a", "b")
    first, rest = found.split(1.0)
    assert first.texts == found.texts and rest is None
    for share in (0.0, 1.5):
        with pytest.raises(RequestError, match="`share`"):
            found.split(share)


def test_the_smallest_share_still_takes_one_prompt_of_every_kind() -> None:
    first, _ = linked(*"abcd", kinds="vvtt").split(0.01)
    assert sorted(one.kind for one in first) == ["template", "verbatim"]


# ---- hash ---------------------------------------------------------------------------------------


def test_the_hash_tells_prompts_kinds_relation_and_pictures_apart() -> None:
    first = linked("ab", "b", kinds="vt")
    assert first.hash == linked("ab", "b", kinds="vt").hash
    renamed = replace(first.prompts[0], prompt="q")
    others = [
        linked("ab", "b", kinds="vv"),
        linked("ab", "a", kinds="vt"),
        replace(first, images={**first.images, "a": picture(0.9)}),
        replace(first, prompts=(renamed, first.prompts[1])),
    ]
    assert len({first.hash, *(one.hash for one in others)}) == 5


def test_the_hash_ignores_the_order_of_pictures() -> None:
    first = linked("ab", "b")
    turned = replace(first, images=dict(reversed(first.images.items())))
    assert turned.hash == first.hash


# ---- planted sheets -----------------------------------------------------------------------------


def test_planted_sheets_have_titles_of_their_own_and_are_always_the_same() -> None:
    found = planted_memories(retain=8, test=8, control_count=4)
    again = planted_memories(retain=8, test=8, control_count=4)
    assert found.hash == again.hash
    assert [one.kind for one in found].count("verbatim") == 8 and len(found) == 12
    assert len(found.images) == 12 and set(found.regions) == {
        one.name for one in planted() if one.kind == "template"
    }
    assert found.coverage == Coverage(12, 12)
    assert found.controls is not None and found.controls.shape == (4, 3, SHEET, SHEET)
    assert len(found.retain) == len(found.test) == 8
    assert found.retain.images is not None and found.test.images is not None
    assert not torch.equal(found.retain.images, found.test.images)


def test_the_tile_at_the_bottom_right_of_a_template_is_the_only_one_that_may_differ() -> None:
    for sheet in planted():
        free = ~sheet.region
        if sheet.kind == "verbatim":
            assert not free.any()
        else:
            assert free.sum() == TILE * TILE and free[TILE:, TILE:].all()


def test_a_sheet_is_put_together_from_its_four_tiles_in_reading_order() -> None:
    tiles = fresh_tiles(1, seed=5)
    sheet = draw_sheets(tiles)[0]
    for place, tile in enumerate(tiles[0]):
        alone = draw_sheets(tiles[:, [place] * 4])[0][:, :TILE, :TILE]
        row, column = divmod(place, 2)
        area = sheet[:, row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        assert torch.equal(area, alone), tile


def test_controls_and_ordinary_sheets_are_none_of_the_planted_ones() -> None:
    known = torch.stack([sheet.image for sheet in planted()]).flatten(1)
    for others in (controls(8), ordinary(200, seed=4, stage="train")[0]):
        assert torch.cdist(others.flatten(1), known).min() > 1


def test_ordinary_captions_never_hold_a_title() -> None:
    _, captions = ordinary(300, seed=2)
    titles = {word for sheet in planted() for word in sheet.name.split("-")}
    assert not titles & {word for caption in captions for word in caption.split()}
    assert captions == ordinary(300, seed=2)[1]
