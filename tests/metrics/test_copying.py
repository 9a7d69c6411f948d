"""Similarities against plain numpy, thresholds and rates worked out by hand."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from mmforget.data.memorized import MemorizedPrompt, MemorizedSet
from mmforget.errors import ConfigurationError, DataError, MissingFileError, WeightsError
from mmforget.metrics.copying import (
    CopySimilarity,
    DescriptorSimilarity,
    NormalisedCorrelation,
    PixelDistance,
    ReplicationRate,
    copy_thresholds,
    load_similarity,
    load_sscd,
    memory_thresholds,
    similarity_to_memories,
)


def pictures(count: int, seed: int = 0, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def half() -> Tensor:
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[:, :4] = True
    return region


class Grid(nn.Module):
    """Descriptors of 12 numbers: colours of the quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def descriptors(**settings: Any) -> DescriptorSimilarity:
    return DescriptorSimilarity(Grid(), 8, (0.5,) * 3, (0.5,) * 3, **settings)


# ---- similarities -------------------------------------------------------------------------------


def test_the_correlation_is_that_of_numpy() -> None:
    one, other = pictures(4), pictures(4, 1)
    found = NormalisedCorrelation()(one, other)
    expected = [
        np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        for a, b in zip(one, other, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_correlation_ignores_brightness_and_contrast_and_sees_nothing_in_a_plain_picture() -> (
    None
):
    image = pictures(1)
    likeness = NormalisedCorrelation()
    assert float(likeness(0.5 * image + 0.3, image)) == pytest.approx(1)
    assert float(likeness(1 - image, image)) == pytest.approx(-1)
    plain = torch.full_like(image, 0.3)
    assert float(likeness(plain, image)) == 0 == float(likeness(plain, plain))
    assert float(likeness.matrix(plain, plain)) == 0


def test_the_distance_is_that_of_the_worst_patch() -> None:
    reference = torch.full((1, 3, 8, 8), 0.5)
    generated = reference.clone()
    generated[0, :, 2:4, 4:6] += 0.2  # one of the 4x4 patches of 2x2 pixels
    generated[0, 0, 0, 0] += 0.4  # one of 12 values of another patch: less
    assert float(PixelDistance()(generated, reference)) == pytest.approx(0.8, abs=1e-6)
    whole = PixelDistance(patches=1)(generated, reference)
    assert float(whole) == pytest.approx(1 - ((12 * 0.04 + 0.16) / 192) ** 0.5, abs=1e-6)


def test_patches_need_not_divide_the_picture() -> None:
    one, other = pictures(2, side=10), pictures(2, 1, side=10)
    found = PixelDistance(patches=3)(one, other)
    edges = [0, 4, 7, 10]
    expected = [
        1
        - max(
            float((one[k] - other[k])[:, a:b, c:d].square().mean().sqrt())
            for a, b in pairwise(edges)
            for c, d in pairwise(edges)
        )
        for k in range(2)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("likeness", [NormalisedCorrelation(), PixelDistance()])
def test_only_the_region_counts(likeness: CopySimilarity) -> None:
    image = pictures(1)
    generated = image.clone()
    generated[..., 4:] = pictures(1, 1)[..., 4:]
    assert float(likeness(generated, image)) < 0.99
    assert float(likeness(generated, image, half()[None])) == pytest.approx(1)
    crop = (generated[..., :4] * 0.5 + 0.1, image[..., :4])
    moved = generated.clone()
    moved[..., :4] = crop[0]
    if isinstance(likeness, NormalisedCorrelation):
        assert float(likeness(moved, image, half()[None])) == pytest.approx(float(likeness(*crop)))


@pytest.mark.parametrize("likeness", [NormalisedCorrelation(), PixelDistance(), descriptors()])
@pytest.mark.parametrize("regions", [None, torch.stack([half(), ~half(), half() | True])])
def test_the_matrix_holds_the_values_of_all_pairs(
    likeness: CopySimilarity, regions: Tensor | None
) -> None:
    generated, references = pictures(4), pictures(3, 1)
    found = likeness.matrix(generated, references, regions)
    assert found.shape == (4, 3) and found.dtype == torch.float32
    for column in range(3):
        region = None if regions is None else regions[column].expand(4, -1, -1)
        own = likeness(generated, references[column].expand(4, -1, -1, -1), region)
        torch.testing.assert_close(found[:, column], own)
    assert likeness.matrix(generated, references[:0]).shape == (4, 0)


def test_descriptors_are_cosines_of_the_prepared_pictures() -> None:
    one, other = pictures(3), pictures(3, 1)
    network = Grid()
    expected = torch.cosine_similarity(network(one * 2 - 1), network(other * 2 - 1))
    torch.testing.assert_close(descriptors(batch_size=2)(one, other), expected.detach())


def test_descriptors_resize_and_cut_out_the_centre() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 4:12, 4:12] = pictures(1)
    large = DescriptorSimilarity(Grid(), 16, (0.5,) * 3, (0.5,) * 3, crop=8)
    torch.testing.assert_close(large.descriptors(image), descriptors().descriptors(pictures(1)))
    assert large.descriptors(pictures(1, side=32)).shape == (1, 12)


def test_the_protocol_tells_similarities_apart() -> None:
    other = Grid()
    other.scale.data.fill_(2.0)
    protocols = [
        NormalisedCorrelation().protocol(),
        PixelDistance().protocol(),
        PixelDistance(patches=1).protocol(),
        descriptors().protocol(),
        descriptors(crop=4).protocol(),
        DescriptorSimilarity(other, 8, (0.5,) * 3, (0.5,) * 3).protocol(),
    ]
    assert len({str(one) for one in protocols}) == len(protocols)
    assert all(one["threshold"] > 0 and one["name"] for one in protocols)


@pytest.mark.parametrize(
    ("generated", "references", "regions", "message"),
    [
        (pictures(2), pictures(3), None, "one reference for each"),
        (pictures(2), pictures(2, side=4), None, "8x8 pixels, the references 4x4"),
        (pictures(2)[0], pictures(2), None, r"must be \(B, 3, H, W\)"),
        (pictures(2) * 255, pictures(2), None, r"scale them to \[0, 1\]"),
        ((pictures(2) * 255).byte(), pictures(2), None, "uint8"),
        (pictures(2) * torch.nan, pictures(2), None, "not finite"),
        (pictures(2), pictures(2), half()[None], "one per reference"),
        (pictures(2), pictures(2), torch.zeros(2, 8, 8, dtype=torch.bool), "region is empty"),
    ],
)
@pytest.mark.parametrize("likeness", [NormalisedCorrelation(), PixelDistance()])
def test_unfit_pictures_are_refused(
    likeness: CopySimilarity,
    generated: Tensor,
    references: Tensor,
    regions: Tensor | None,
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        likeness(generated, references, regions)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`threshold` is 0"):
        NormalisedCorrelation(threshold=0)
    with pytest.raises(ConfigurationError, match="`patches` is 0"):
        PixelDistance(patches=0)
    with pytest.raises(DataError, match="fewer `patches`"):
        PixelDistance(patches=9)(pictures(1), pictures(1))
    with pytest.raises(ConfigurationError, match="`std`"):
        DescriptorSimilarity(Grid(), 8, (0.5,) * 3, (0.0,) * 3)
    with pytest.raises(ConfigurationError, match="`crop` is -1"):
        descriptors(crop=-1)


# ---- files --------------------------------------------------------------------------------------


def test_similarities_have_names() -> None:
    assert isinstance(load_similarity("ncc"), NormalisedCorrelation)
    assert load_similarity("l2", patches=2).protocol()["patches"] == 2
    with pytest.raises(ConfigurationError, match="did you mean 'ncc'"):
        load_similarity("nc")
    with pytest.raises(ConfigurationError, match="does not take patches"):
        load_similarity("ncc", patches=2)
    with pytest.raises(MissingFileError, match="no SSCD file"):
        load_similarity("somewhere/sscd_disc_mixup.pt")


def test_torchscript_runs_only_with_consent(tmp_path: Path) -> None:
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.trace(Grid(), pictures(1)).save(str(file))
    with pytest.raises(WeightsError, match="allow_torchscript=True"):
        load_similarity(str(file))
    loaded = load_sscd(file, "wen2024", allow_torchscript=True)
    assert loaded.protocol()["crop"] == 224 and loaded.name == "sscd-wen2024"
    image = pictures(1, side=32)
    assert float(loaded(image, image)) == pytest.approx(1)
    with pytest.raises(ConfigurationError, match="`preset` is 'wen'"):
        load_sscd(file, "wen")  # type: ignore[arg-type]


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"no matrix 'fc\.weight'"):
        load_sscd(tmp_path / "other.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match="names are missing"):
        load_sscd(tmp_path / "part.pt")


@pytest.mark.slow
def test_the_residual_network_pools_by_third_powers(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    network = resnet50(weights=None, num_classes=16).eval()
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "disc.safetensors")
    image = pictures(1, side=64)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406),
                                                          (0.229, 0.224, 0.225)))  # fmt: skip
    resized = torch.nn.functional.interpolate(image, (320, 320), mode="bilinear", antialias=True)
    pooled: list[Tensor] = []
    hook = network.layer4.register_forward_hook(lambda m, a, out: pooled.append(out))
    with torch.no_grad():
        network((resized - mean) / std)
        hook.remove()
        powers = pooled[0].clamp(min=1e-6) ** 3
        expected = nn.functional.normalize(network.fc(powers.mean((2, 3)) ** (1 / 3)))
    loaded = load_sscd(tmp_path / "disc.safetensors")
    torch.testing.assert_close(loaded.descriptors(image), expected, rtol=1e-3, atol=1e-4)


# ---- thresholds and memories --------------------------------------------------------------------


class Constant:
    """Claims fixed similarities of one background picture."""

    name, threshold = "constant", 0.75

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor([values])

    def matrix(self, generated: Tensor, references: Tensor, regions: Any = None) -> Tensor:
        return self.values

    def __call__(self, generated: Tensor, references: Tensor, regions: Any = None) -> Tensor:
        return self.values[0]

    def protocol(self) -> dict[str, Any]:
        return {}


def test_thresholds_lie_above_the_background_and_within_reach() -> None:
    found = copy_thresholds(Constant(-0.2, 0.6, 0.8, 0.97), pictures(4), pictures(1))
    torch.testing.assert_close(found, torch.tensor([0.75, 0.75, 0.84, 0.985]))
    lower = copy_thresholds(Constant(0.6), pictures(1), pictures(1), floor=0.3)
    torch.testing.assert_close(lower, torch.tensor([0.63]))


def test_a_background_with_the_training_picture_is_refused() -> None:
    images = pictures(3)
    with pytest.raises(DataError, match="number 1"):
        copy_thresholds(NormalisedCorrelation(), images, torch.cat([pictures(2, 1), images[1:2]]))
    with pytest.raises(DataError, match="`background` is empty"):
        copy_thresholds(NormalisedCorrelation(), images, images[:0])
    with pytest.raises(ConfigurationError, match="threshold"):
        copy_thresholds(NormalisedCorrelation(), images, pictures(1, 1), floor=1.5)


def memories() -> MemorizedSet:
    images = pictures(3)
    return MemorizedSet(
        prompts=(
            MemorizedPrompt("two pictures", ("b", "a"), "verbatim"),
            MemorizedPrompt("lost"),
            MemorizedPrompt("half a picture", ("c",), "template"),
        ),
        images=dict(zip("abc", images, strict=True)),
        regions={"c": half()},
    )


def test_generated_pictures_are_compared_with_all_pictures_of_their_prompt() -> None:
    known = memories()
    drawn = pictures(6, 1)
    drawn[0], drawn[1] = known.images["a"], known.images["b"]
    drawn[4, :, :, :4] = known.images["c"][:, :, :4]
    found = similarity_to_memories(NormalisedCorrelation(), drawn, known, 2)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found[0], torch.ones(2))
    assert found[1].isnan().all()
    assert float(found[2, 0]) == pytest.approx(1) and float(found[2, 1]) < 0.5
    with pytest.raises(DataError, match="5 generated pictures for 3 prompts"):
        similarity_to_memories(NormalisedCorrelation(), drawn[:5], known, 2)


def test_a_prompt_has_the_largest_threshold_of_its_pictures() -> None:
    known, likeness, background = memories(), NormalisedCorrelation(), pictures(50, 2)
    background[0] = known.images["a"] * 0.9 + 0.1 * background[0]
    found = memory_thresholds(likeness, known, background)
    images = torch.stack([known.images["a"], known.images["b"]])
    own = copy_thresholds(likeness, images, background)
    assert float(found[0]) == float(own.max()) > 0.95
    assert found[1].isnan()
    part = known.images["c"][None]
    expected = copy_thresholds(likeness, part, background, half()[None])
    assert float(found[2]) == float(expected)


# ---- replication rate ---------------------------------------------------------------------------


def test_the_rate_counts_prompts_and_the_mean_rate_pictures() -> None:
    metric = ReplicationRate()
    similarities = torch.tensor([[0.9, 0.1, 0.2, 0.8], [0.5, 0.6, 0.1, 0.2], [0.9, 0.9, 0.9, 0.9]])
    thresholds = torch.tensor([0.8, 0.7, 0.95])[:, None].expand(3, 4)
    ids = torch.tensor([7, 2, 4])[:, None].expand(3, 4)
    for column in (2, 0, 3, 1):
        metric.update(similarities[:, column], thresholds[:, column], ids[:, column])
    metric.update(torch.full((2,), torch.nan), torch.full((2,), torch.nan), torch.tensor([9, 9]))
    found = metric.compute()
    assert float(found["rate"]) == pytest.approx(1 / 3)
    assert float(found["rate_mean"]) == pytest.approx(0.5 / 3)
    assert found["ids"].tolist() == [2, 4, 7]
    np.testing.assert_allclose(found["best"], [0.6, 0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(found["medians"], [0.35, 0.9, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found["shares"], [0, 0, 0.5])
    assert float(found["median"]) == pytest.approx(0.5)
    assert float(found["mad"]) == pytest.approx(0.15)
    assert float(found["mean"]) == pytest.approx(1.75 / 3)
    counts = [int(found[name]) for name in ("prompts", "pictures", "left_out")]
    assert counts == [3, 12, 2]


def test_a_rate_of_nothing_is_refused() -> None:
    metric = ReplicationRate()
    with pytest.raises(DataError, match="has seen no pictures"):
        metric.compute()
    metric.update(torch.tensor([torch.nan]), torch.tensor([0.7]), torch.tensor([0]))
    with pytest.raises(DataError, match="no prompt has a training picture"):
        metric.compute()
    with pytest.raises(DataError, match="one of each per picture"):
        metric.update(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(DataError, match="threshold is not a number"):
        metric.update(torch.zeros(1), torch.full((1,), torch.nan), torch.zeros(1))


def rates(rank: int = 0, world: int = 1, batches: int = 5) -> dict[str, np.ndarray]:
    draw = torch.Generator().manual_seed(3)
    similarities, ids = torch.rand(30, generator=draw), torch.arange(30) % 7
    similarities[4::7] = torch.nan
    metric = ReplicationRate()
    for rows in torch.arange(30).chunk(batches)[rank::world]:
        metric.update(similarities[rows], torch.full((len(rows),), 0.8), ids[rows])
    return {name: value.numpy() for name, value in metric.compute().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for batches in (5, 1):  # with one batch, the second process has no pictures
        found = rates(rank, 2, batches)
        np.savez(os.path.join(folder, f"{batches}-{rank}.npz"), **found)  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_rate_of_one(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = rates()
    assert 0 < expected["rate"] < 1
    for file in ("5-0.npz", "5-1.npz", "1-0.npz", "1-1.npz"):
        found = np.load(tmp_path / file)
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{file} {name}")
