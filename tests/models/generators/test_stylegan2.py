"""StyleGAN2 draws what the official code draws, and offers what methods need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mmforget.errors import ModelError
from mmforget.models.base import Latents, state_hash
from mmforget.models.gan import ImageGAN
from mmforget.models.gan_files import load_gan
from mmforget.models.generators.base import HasLayerGroups, StyleBased
from mmforget.models.generators.stylegan2 import ModulatedConv, StyledConv, StyleGAN2

LATENTS = torch.sin(torch.arange(16.0) * 1.3).reshape(2, 8) * 1.5
WIDTHS = {4: 6, 8: 6, 16: 4}
TINY: dict[str, Any] = {
    "latent_size": 8, "style_size": 8, "channels": (6, 6, 4), "mapping_layers": 2,
}  # fmt: skip


def some(images: Tensor) -> Tensor:
    """Seven values spread over a batch."""
    values = images.flatten()
    return values[:: len(values) // 7][:7]


def tiny(**more: Any) -> StyleGAN2:
    torch.manual_seed(0)
    network = StyleGAN2(**(TINY | more)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
    return network


@torch.no_grad()
def test_it_draws_what_the_official_code_draws(
    nvidia_pickle: Any, stylegan2_shapes: Any, fill: Any
) -> None:
    weights = fill(stylegan2_shapes(WIDTHS, layers=8))
    arguments = {"z_dim": 8, "mapping_kwargs": {"num_layers": 8}, "synthesis_kwargs": {}}
    path = nvidia_pickle.write(weights, arguments)
    network = load_gan(path, check=False).network
    # drawn by stylegan2-ada-pytorch (as packed in draggan 1.1.6) from the same weights
    expected = torch.tensor([1.28865, 276.44669, 66.49914, -10.56519, 0.226, -536.552, -56.94739])
    torch.testing.assert_close(some(network(LATENTS)), expected, rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_classes_grey_pictures_and_clamping_are_those_of_the_official_code(
    nvidia_pickle: Any, stylegan2_shapes: Any, fill: Any
) -> None:
    weights = fill(stylegan2_shapes(WIDTHS, classes=3, image=1))
    path = nvidia_pickle.write(weights, {"c_dim": 3, "synthesis_kwargs": {"conv_clamp": 1.2}})
    model = load_gan(path, check=False)
    labels = torch.eye(3)[torch.tensor([0, 2])]
    expected = torch.tensor([-2.13951, 2.54031, -3.0132, 1.90946, -3.075, 1.35711, -0.77501])
    torch.testing.assert_close(some(model.network(LATENTS, labels)), expected, rtol=1e-4, atol=1e-3)
    assert model.num_classes == 3 and model.label_format == "one_hot" and model.channels == 1
    assert model.generate(["2"], 2).shape == (2, 3, 16, 16)


@torch.no_grad()
def test_a_modulated_convolution_is_one_with_weights_of_its_own_per_picture() -> None:
    torch.manual_seed(1)
    layer = ModulatedConv(5, 4, 3, 8, demodulate=True, equalised=False)
    maps, styles = torch.randn(3, 5, 6, 6), torch.randn(3, 8)
    expected = []
    for picture, scales in zip(maps, layer.style(styles), strict=True):
        weight = layer.weight * scales[None, :, None, None]
        weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected.append(conv2d(picture[None], weight, padding=1)[0])
    found = layer.modulated(maps, styles, up=False)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_doubling_convolves_the_map_with_zeros_between_and_smooths_it() -> None:
    torch.manual_seed(2)
    layer = StyledConv(3, 2, 10, 8, up=True, equalised=False, clamp=None)
    layer.demodulate = False
    maps, styles = torch.randn(2, 3, 5, 5), torch.randn(2, 8)
    low_pass = tiny().low_pass
    wide = torch.zeros(2, 3, 9, 9)
    wide[:, :, ::2, ::2] = maps * layer.style(styles)[:, :, None, None]
    convolved = conv2d(wide, layer.weight.flip(2, 3), padding=2)  # 11x11
    smooth = conv2d(convolved.flatten(0, 1)[:, None], low_pass[None, None], padding=1)
    expected = torch.nn.functional.leaky_relu(smooth.reshape(2, 2, 10, 10), 0.2) * 2**0.5
    found = layer(maps, styles, "none", low_pass)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_stored_factors_of_convolutions_make_no_difference_to_the_picture() -> None:
    plain, scaled = tiny(), tiny(equalised=True)
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(LATENTS), scaled(LATENTS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_noise_is_constant_random_or_left_out() -> None:
    network = tiny()
    styles = network.map_latents(LATENTS)[:, None].expand(-1, network.num_ws, -1)
    constant = network.synthesise(styles)
    assert torch.equal(constant, network.synthesise(styles))
    assert torch.equal(constant, network(LATENTS))
    torch.manual_seed(0)
    drawn = network.synthesise(styles, noise="random")
    assert not torch.allclose(drawn, network.synthesise(styles, noise="random"))
    assert not torch.allclose(constant, network.synthesise(styles, noise="none"))
    for layer in (block for group in network.blocks for block in group):  # type: ignore[attr-defined]
        layer.noise_strength.zero_()
    torch.testing.assert_close(network(LATENTS), network.synthesise(styles, noise="random"))


@torch.no_grad()
def test_every_style_steers_the_picture_and_pictures_do_not_depend_on_their_batch() -> None:
    network = tiny()
    styles = network.map_latents(LATENTS)[:, None].repeat(1, network.num_ws, 1)
    before = network.synthesise(styles)
    for number in range(network.num_ws):
        moved = styles.clone()
        moved[:, number] += 1
        assert not torch.allclose(before, network.synthesise(moved)), number
    torch.testing.assert_close(before[:1], network.synthesise(styles[:1]))


def test_groups_cover_every_parameter_once_in_forward_order() -> None:
    network = tiny()
    assert isinstance(network, StyleBased) and isinstance(network, HasLayerGroups)
    groups = network.layer_groups()
    assert list(groups) == [
        "mapping", "const", "block.4", "to_image.4", "block.8", "to_image.8", "block.16",
        "to_image.16",
    ]  # fmt: skip
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())


def test_an_image_gan_maps_to_styles_trains_and_saves_it(tmp_path: Path) -> None:
    model = ImageGAN("stylegan2", TINY).eval()
    latents = model.draw(3, 0)
    assert model.mapped(latents).codes.shape == (3, 6, 8)
    codes = model.mapped(latents, "w").codes.detach().requires_grad_()
    model.synthesise(Latents(codes, space="w")).sum().backward()
    assert codes.grad is not None and codes.grad.abs().sum() > 0
    assert all(
        parameter.grad is not None
        for name, parameter in model.network.named_parameters()
        if not name.startswith("mapping.")
    )
    model.save_native(tmp_path)
    again = load_gan(tmp_path, check=False)
    assert state_hash(again.network) == state_hash(model.network)
    assert torch.equal(again.pictures(latents), model.pictures(latents))
    assert state_hash(model.fresh(1).network) != state_hash(model.network)


def test_the_mean_style_is_followed_in_training_mode_only() -> None:
    network = tiny()
    styles = network.map_latents(LATENTS).detach()
    assert not network.mean_style().any()
    network.train().map_latents(LATENTS)
    torch.testing.assert_close(network.mean_style(), 0.005 * styles.mean(dim=0))


@pytest.mark.slow
def test_it_becomes_a_program_for_any_number_of_pictures(tmp_path: Path) -> None:
    model = ImageGAN("stylegan2", TINY | {"num_classes": 2}, label_format="one_hot").eval()
    model.save_program(tmp_path)
    program = torch.export.load(tmp_path / "generator.pt2").module()
    latents, labels = torch.randn(5, 8), torch.eye(2)[torch.tensor([0, 1, 1, 0, 1])]
    torch.testing.assert_close(program(latents, labels), model.network(latents, labels))


def test_sizes_that_cannot_be_and_missing_labels_are_refused() -> None:
    with pytest.raises(ModelError, match="channels"):
        StyleGAN2(channels=())
    with pytest.raises(ModelError, match="image_channels"):
        StyleGAN2(**(TINY | {"image_channels": 4}))
    with pytest.raises(ModelError, match="mapping_layers"):
        StyleGAN2(**(TINY | {"mapping_layers": 0}))
    with pytest.raises(ModelError, match="labels"):
        tiny(num_classes=3)(LATENTS)
