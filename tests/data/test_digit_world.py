from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmforget.data import digit_world as world
from mmforget.data.digit_world import DigitWorld, facts, render, stage_strokes, strokes
from mmforget.data.split import read_hashed, write_hashed
from mmforget.errors import DataError

STAGES = ("train", "val", "test")


def test_strokes_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    reference = load_digits()
    ink, digit = strokes()
    assert np.array_equal(ink * 16, reference.images)
    assert np.array_equal(digit, reference.target)


def test_frozen_stages_are_disjoint_complete_and_stratified() -> None:
    stages = stage_strokes()
    everything = np.concatenate(list(stages.values()))
    assert np.array_equal(np.sort(everything), np.arange(1797))
    total = np.bincount(strokes()[1])
    for stage, share in (("train", 0.6), ("val", 0.15), ("test", 0.25)):
        counts = np.bincount(strokes()[1][stages[stage]], minlength=10)
        assert np.abs(counts - share * total).max() <= 1


def test_no_test_stroke_is_drawn_in_training() -> None:
    data = DigitWorld()
    drawn = {stage: set((data.dataset(stage).ids // 1000).tolist()) for stage in STAGES}
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["val"]
    assert not drawn["val"] & drawn["test"]
    assert {stage: len(data.dataset(stage)) for stage in STAGES} == {
        "train": 8 * len(drawn["train"]),
        "val": 2 * len(drawn["val"]),
        "test": 2 * len(drawn["test"]),
    }


def test_changed_split_file_and_other_strokes_are_refused(tmp_path: Path) -> None:
    shipped = Path(world.__file__).parents[1] / "assets" / world.SPLIT_FILE
    content = read_hashed(shipped)
    path = tmp_path / "split.json"

    write_hashed(path, content)
    assert stage_strokes(path).keys() == set(STAGES)

    changed = json.loads(path.read_text())
    changed["train"].append(changed["test"].pop())
    path.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="does not match its own hash"):
        stage_strokes(path)

    write_hashed(path, content | {"strokes_sha256": "0" * 64})
    with pytest.raises(DataError, match="belongs to other digits"):
        stage_strokes(path)


def test_an_image_depends_on_its_id_alone() -> None:
    few, many = DigitWorld(variants=2, seed=3), DigitWorld(variants=5)
    ids = few.dataset("train").ids[:40]
    rows = np.flatnonzero(np.isin(many.dataset("train").ids, ids))
    assert torch.equal(
        few.dataset("train").images(np.arange(40)), many.dataset("train").images(rows)
    )
    assert torch.equal(render(ids)[7:8], render(ids[7:8]))


def test_drawing_agrees_with_its_facts() -> None:
    ids = DigitWorld(strokes=50).dataset("train").ids
    images = render(ids).numpy().astype(int)
    seen = set()
    for image, fact in zip(images, facts(ids), strict=True):
        ink, back = np.array(world.INKS[fact.ink]), np.array(world.BACKGROUNDS[fact.background])
        left, top, right, bottom = fact.box
        assert 0 <= left < right <= 32
        assert 0 <= top < bottom <= 32
        outside = np.ones((32, 32), dtype=bool)
        # bilinear interpolation spreads half a cell beyond the outer cells' centres
        margin = fact.size / 16
        inner = (
            slice(max(0, int(top - margin)), int(np.ceil(bottom + margin))),
            slice(max(0, int(left - margin)), int(np.ceil(right + margin))),
        )
        outside[inner] = False
        assert (image[:, outside] == back[:, None]).all()
        share = (image - back[:, None, None]).sum(0) / (ink - back).sum()
        assert share.max() > 0.6
        seen.add((fact.ink, fact.background))
    assert len(seen) == len(world.INKS) * len(world.BACKGROUNDS)


def test_drawing_is_the_bilinear_interpolation_of_the_stroke() -> None:
    ids = DigitWorld(strokes=30).dataset("test").ids
    drawn = render(ids)
    for row, (id, fact) in enumerate(zip(ids, facts(ids), strict=True)):
        scale = 32 / fact.size
        theta = torch.tensor(
            [
                [scale, 0, -((fact.left + fact.size / 2) / 16 - 1) * scale],
                [0, scale, -((fact.top + fact.size / 2) / 16 - 1) * scale],
            ]
        )[None].float()
        grid = torch.nn.functional.affine_grid(theta, [1, 1, 32, 32], align_corners=False)
        stroke = torch.from_numpy(strokes()[0][id // 1000])[None, None]
        ink = torch.nn.functional.grid_sample(stroke, grid, align_corners=False)[0]
        front = torch.tensor(world.INKS[fact.ink])[:, None, None]
        back = torch.tensor(world.BACKGROUNDS[fact.background])[:, None, None]
        expected = back + ink * (front - back)
        assert (expected - drawn[row]).abs().max() <= 0.51


def test_every_ink_can_be_read_on_every_background() -> None:
    for ink in world.INKS.values():
        for back in world.BACKGROUNDS.values():
            assert np.linalg.norm(np.subtract(ink, back)) > 120
    assert not set(world.INKS) & set(world.BACKGROUNDS)


def test_labels_and_captions_say_the_facts() -> None:
    digits, inks = DigitWorld(strokes=40), DigitWorld(strokes=40, label="ink")
    assert digits.class_names[3] == "three"
    assert inks.class_names == tuple(world.INKS)
    for position, id in enumerate(digits.dataset("val").ids.tolist()):
        fact = digits.facts(id)
        assert digits.class_names[digits.dataset("val").labels[position]] == fact.digit
        assert inks.class_names[inks.dataset("val").labels[position]] == fact.ink
        assert digits.caption(id) == f"a {fact.ink} {fact.digit} on a {fact.background} background"


def test_few_strokes_are_balanced_and_ids_are_stroke_and_variant() -> None:
    data = DigitWorld(strokes=20, variants=3)
    for stage, count in (("train", 6), ("val", 4), ("test", 4)):
        assert np.bincount(data.dataset(stage).labels).tolist() == [count] * 10
    assert set((data.dataset("train").ids % 1000).tolist()) == {0, 1, 2}


def test_huggingface_copy_has_the_same_pixels_and_facts() -> None:
    import datasets

    data = DigitWorld(strokes=10)
    copy = data.to_huggingface("test")
    assert isinstance(copy.features["image"], datasets.Image)
    assert copy.features["label"].names == list(data.class_names)
    assert copy["id"][:] == data.dataset("test").ids.tolist()
    for row in (0, 7, 19):
        fact = data.facts(copy[row]["id"])
        assert (copy[row]["ink"], copy[row]["background"]) == (fact.ink, fact.background)
        assert copy[row]["caption"] == fact.caption
        assert copy[row]["box"] == pytest.approx(fact.box)
        pixels = torch.from_numpy(np.array(copy[row]["image"])).permute(2, 0, 1)
        assert torch.equal(pixels, data.dataset("test").pixels(np.array([row]))[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variants": 0}, "`variants` is 0"),
        ({"eval_variants": 1001}, "`eval_variants` is 1001"),
        ({"strokes": 0}, "`strokes` is 0"),
        ({"label": "inc"}, "did you mean 'ink'"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"num_workers": -1}, "`num_workers` is -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        DigitWorld(**options)


@pytest.mark.parametrize("id", [-1, 1797 * 1000])
def test_facts_of_no_sample_are_refused(id: int) -> None:
    with pytest.raises(DataError, match="there is no sample"):
        DigitWorld().facts(id)
