"""Pictures that show nothing are found, real ones are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mmforget
from mmforget import DigitWorld
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.vacuous import (
    NOISE_CORRELATION,
    VacuousCheck,
    neighbour_correlation,
    noise_threshold,
    untouched,
    vacuous,
)
from mmforget.models.diffusion import load_generator

ASSETS = Path(mmforget.__file__).parent / "assets" / "digit_world"


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    data = DigitWorld().dataset("test")
    return data.images(np.arange(len(data)))


def random(kind: str, n: int = 500, side: int = 32) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    if kind == "uniform":
        return torch.rand(n, 3, side, side, generator=chance)
    values = torch.randn(n, 3, side, side, generator=chance)
    if kind == "grey noise":  # the same in all channels
        values = values[:, :1].expand(-1, 3, -1, -1)
    return (0.5 + 0.1 * values).clamp(0, 1)


def test_correlation_by_hand():
    stripes = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(1, 3, 4, 4)
    # horizontal neighbours are opposite, vertical ones equal
    assert neighbour_correlation(stripes).item() == pytest.approx(0)
    board = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).expand(1, 3, 4, 4).float()
    assert neighbour_correlation(board).item() == pytest.approx(-1)
    assert neighbour_correlation(torch.ones(1, 3, 4, 4)).isnan().all()


def test_real_pictures_show_something(digits):
    assert len(digits) == 908
    assert not torch.stack(list(vacuous(digits).values())).any()
    assert neighbour_correlation(digits).min() > 0.94
    # a noisy, but readable picture is no noise either
    noisy = (digits + 0.05 * torch.randn(digits.shape)).clamp(0, 1)
    assert not vacuous(noisy)["noise"].any()


def test_decoded_noise_is_found_with_a_threshold_from_good_pictures(digits):
    """What a collapsed latent diffusion model paints is as smooth as a picture."""
    generator = load_generator(ASSETS / "diffusion_unet")
    latents = torch.randn(300, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    noise = generator.to_images(latents)
    assert not vacuous(noise)["noise"].any()
    threshold = noise_threshold(digits[::2])
    found = {}
    for name, images in (("noise", noise), ("good", digits[1::2])):
        check = VacuousCheck(noise_below=threshold, cell=2)
        check.update(images)
        found[name] = check.compute()["noise"].item()
    assert found["noise"] > 0.85 and found["good"] < 0.01


def test_thresholds(digits):
    images = digits[:20]
    assert noise_threshold(images) == neighbour_correlation(images, 2).min()
    assert not vacuous(images, noise_threshold(images), 2)["noise"].any()
    coarse = images.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    torch.testing.assert_close(neighbour_correlation(images, 2), neighbour_correlation(coarse))
    for reference in (images[:0], torch.cat([images, torch.zeros(1, 3, 32, 32)])):
        with pytest.raises(DataError, match="constant"):
            noise_threshold(reference)
    with pytest.raises(ConfigurationError, match="`noise_below`"):
        VacuousCheck(noise_below=2.0)
    with pytest.raises(ConfigurationError, match="`cell`"):
        VacuousCheck(cell=0)
    with pytest.raises(DataError, match="4x4"):
        vacuous(torch.rand(1, 3, 3, 8), cell=2)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "grey noise"])
def test_noise(kind):
    found = vacuous(random(kind))
    assert found["noise"].all() and not found["constant"].any()
    assert neighbour_correlation(random(kind)).max() < 0.1 < NOISE_CORRELATION


def test_black_and_constant_pictures():
    images = torch.zeros(6, 3, 8, 8)
    images[1] = 1 / 255
    images[2, 1] = 0.5  # green all over
    images[3] = 0.5
    images[3, 0, 0, 0] += 2 / 255 - 1e-6
    images[4] = 0.5
    images[4, 0, 0, 0] += 3 / 255
    images[5, :, ::2] = 1.0
    found = vacuous(images)
    assert found["black"].tolist() == [True, True, False, False, False, False]
    assert found["constant"].tolist() == [True, True, True, True, False, False]
    assert not found["noise"][:4].any()


def test_untouched(digits):
    changed = digits[:3].clone()
    changed[1, 0, 3, 3] = 1 - changed[1, 0, 3, 3]
    changed[2] += 0.9 / 255
    assert untouched(changed, digits[:3]).tolist() == [True, False, True]
    with pytest.raises(DataError, match="compared"):
        untouched(changed, digits[:2])


def test_shares(digits):
    check = VacuousCheck()
    edited = digits[:8].clone()
    edited[0] = 0
    edited[1] = 0.5
    edited[2:4] = random("uniform", 2)
    check.update(edited, digits[:8])
    found = {key: value.item() for key, value in check.compute().items()}
    assert found == {"black": 1 / 8, "constant": 2 / 8, "noise": 2 / 8, "untouched": 4 / 8}
    check.update(digits[8:16])  # without originals
    check.update(digits[:0])
    found = {key: value.item() for key, value in check.compute().items()}
    assert found == {"black": 1 / 16, "constant": 2 / 16, "noise": 2 / 16, "untouched": 4 / 8}
    alone = VacuousCheck()
    alone.update(digits[:1])
    assert "untouched" not in alone.compute()


def test_errors():
    with pytest.raises(DataError, match="no pictures"):
        VacuousCheck().compute()
    with pytest.raises(DataError, match="shape"):
        vacuous(torch.zeros(3, 8, 8))
    with pytest.raises(DataError, match="not finite"):
        vacuous(torch.full((1, 3, 4, 4), torch.nan))
    for images in (torch.full((1, 3, 4, 4), 200.0), torch.full((1, 3, 4, 4), -1.0)):
        with pytest.raises(DataError, match="scale them"):
            vacuous(images)
