"""StyleGAN3 draws what the official code draws, in both configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.errors import ModelError
from mmforget.models.gan import ImageGAN
from mmforget.models.gan_files import load_gan
from mmforget.models.generators.base import HasLayerGroups, StyleBased
from mmforget.models.generators.stylegan3 import StyleGAN3

LATENTS = torch.sin(torch.arange(16.0) * 1.3).reshape(2, 8) * 1.5
TINY: dict[str, Any] = {
    "latent_size": 8, "style_size": 8, "channels": (6, 6, 4, 4), "resolution": 16,
}  # fmt: skip
DRAWN = {
    False: [0.00905, 0.00905, -0.26168, -0.29379, -0.11614, -0.20521, -0.27503],
    True: [0.01482, -0.00482, -0.27286, -0.30993, -0.13701, -0.18853, -0.28559],
}


def some(images: Tensor) -> Tensor:
    """Seven values spread over a batch."""
    values = images.flatten()
    return values[:: len(values) // 7][:7]


@pytest.mark.parametrize("radial", [False, True])
@torch.no_grad()
def test_it_draws_what_the_official_code_draws(
    nvidia_pickle: Any, stylegan3_shapes: Any, fill: Any, radial: bool
) -> None:
    arguments = {"img_resolution": 16, "num_layers": 4, "channel_base": 64, "channel_max": 6}
    if radial:
        arguments |= {"conv_kernel": 1, "use_radial_filters": True}
    path = nvidia_pickle.write(fill(stylegan3_shapes(radial)), arguments)
    model = load_gan(path, check=False)
    # drawn by the official networks (as packed in draggan 1.1.6) from the same weights
    expected = torch.tensor(DRAWN[radial])
    torch.testing.assert_close(some(model.network(LATENTS)), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("radial", [False, True])
def test_a_new_network_has_the_filters_of_the_official_one(radial: bool) -> None:
    kernel_size = 1 if radial else 3
    first = StyleGAN3(**TINY, kernel_size=kernel_size, radial=radial).layers[0]
    up = torch.tensor([0.000792, 0.010018, 0.03895, 0.092413, 0.156526, 0.201302])
    torch.testing.assert_close(first.up_filter[:6], up, rtol=0, atol=1e-6)
    if radial:
        middle = torch.tensor([0.000205, 0.002279, 0.008198, 0.018542, 0.030533, 0.038755])
        torch.testing.assert_close(first.down_filter[5, :6], middle, rtol=0, atol=1e-6)
    else:
        assert first.down_filter.shape == (12,)


@torch.no_grad()
def test_the_shift_of_a_style_moves_the_waves() -> None:
    torch.manual_seed(0)
    network = StyleGAN3(**TINY).eval()
    style = torch.zeros(1, 8)
    before = network.input(style)
    pixels = 2
    network.input.style.bias[2] = pixels / network.input.band.rate  # right, in pictures
    moved = network.input(style)
    torch.testing.assert_close(moved[..., pixels:], before[..., :-pixels], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved, before)


@torch.no_grad()
def test_pictures_depend_on_every_style_but_not_on_their_batch() -> None:
    torch.manual_seed(0)
    network = StyleGAN3(**TINY, clamp=None).eval()
    assert isinstance(network, StyleBased) and isinstance(network, HasLayerGroups)
    styles = network.map_latents(LATENTS)[:, None].repeat(1, network.num_ws, 1)
    network.input.style.weight.normal_()  # it starts at zero
    before = network.synthesise(styles)
    assert before.shape == (2, 3, 16, 16)
    torch.testing.assert_close(before, network(LATENTS))
    torch.testing.assert_close(before[:1], network.synthesise(styles[:1]))
    for number in range(network.num_ws - 1):
        moved = styles.clone()
        moved[:, number] += 1
        assert not torch.allclose(before, network.synthesise(moved)), number


def test_groups_cover_every_parameter_once_and_all_get_gradients() -> None:
    network = StyleGAN3(**TINY)
    names = [name for group in network.layer_groups().values() for name in group]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    network(LATENTS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_sizes_that_cannot_be_are_refused() -> None:
    for wrong in ({"resolution": 20}, {"channels": (4, 4)}, {"kernel_size": 5}):
        with pytest.raises(ModelError, match=next(iter(wrong))):
            ImageGAN("stylegan3", TINY | wrong)
