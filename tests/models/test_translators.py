"""Translator: the fusions by hand, any size of picture, where a fresh one starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.translators import Translator


def small(**settings) -> Translator:
    return Translator.seeded(0, **({"network": "small", "width": 4, "levels": 2} | settings))


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


ONE = torch.tensor([0.2, 0.6, 1.0]).view(1, 3, 1, 1)
OTHER = torch.tensor([0.5, 0.25, 0.75]).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("multiply", [0.1, 0.15, 0.75]),
        ("none", [0.5, 0.25, 0.75]),
        ("average", [0.35, 0.425, 0.875]),
    ],
)
def test_fusions_by_hand(fusion, expected):
    found = small(fusion=fusion).fuse(ONE, OTHER)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_multiplication_is_clipped():
    found = small(fusion="multiply").fuse(torch.full((1, 3, 1, 1), 2.0), OTHER)
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 0.5, 1.0]))


def test_spatial_attention_by_hand():
    network = small(fusion="spatial_attention")
    with torch.no_grad():
        network.attention.weight.zero_()
        # one pixel meets the centre of the kernel only
        network.attention.weight[0, :, 3, 3] = torch.tensor([1.0, 2.0, -1.0, 0.5])
        network.attention.bias.fill_(0.3)
    # means 0.6 and 0.5, maxima 1 and 0.75: 0.6 + 2 - 0.5 + 0.375 + 0.3
    share = 1 / (1 + math.exp(-2.775))
    expected = [0.2 + share * 0.3, 0.6 - share * 0.35, 1.0 - share * 0.25]
    torch.testing.assert_close(network.fuse(ONE, OTHER).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("settings", [{}, {"network": "resnet18"}])
@pytest.mark.parametrize("size", [(33, 47), (1, 5)])
def test_any_size_and_one_channel(settings, size):
    network = small(fusion="none", **settings).eval()
    grey = pictures(2, 1, *size)
    found = network(grey)
    assert found.shape == (2, 3, *size)
    assert bool(((found >= 0) & (found <= 1)).all())
    torch.testing.assert_close(found, network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("fusion", ["multiply", "spatial_attention"])
@pytest.mark.parametrize("network", ["small", "resnet18"])
def test_a_fresh_translator_is_nearly_neutral_where_it_can_be(fusion, network):
    images = pictures(2, 3, 40, 40)
    found = small(network=network, fusion=fusion)(images)
    assert 0 < float((found - images).abs().max()) < 0.025


@pytest.mark.parametrize("fusion", ["multiply", "none", "average", "spatial_attention"])
def test_every_parameter_learns_at_the_first_step(fusion):
    network = small(fusion=fusion)
    network(pictures(2, 3, 24, 24)).square().sum().backward()
    # the normalised layers ignore the scale of their weights, but not these weights
    assert all(float(p.grad.abs().sum()) > 0 for p in network.parameters())


def test_a_picture_depends_on_no_other():
    network = small(network="resnet18", fusion="none").train()
    images = pictures(3, 3, 32, 32)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=1e-4, atol=1e-6)


def test_resnet34_has_its_depth_and_outputs_full_resolution():
    network = small(network="resnet34", fusion="none")
    assert network.encoder.channels == [3, 64, 64, 128, 256, 512]
    counts = [len(stage[-1]) if i == 0 else len(stage) for i, stage in
              enumerate(network.encoder.stages)]  # fmt: skip
    assert counts == [3, 4, 6, 3]
    assert [f.shape[-1] for f in network.encoder(pictures(1, 3, 64, 64))] == [64, 32, 16, 8, 4, 2]


def test_frozen_normalisation_fits_the_weights_of_torchvision():
    from torchvision.models import resnet18

    network = small(network="resnet18", frozen_norm=True)
    own = network.encoder.state_dict()
    source = resnet18(weights=None).state_dict()
    renamed = {}
    for name, value in source.items():
        for old, new in (("conv1.", "stem.0."), ("bn1.", "stem.1."), ("layer1.", "stages.0.1.")):
            if name.startswith(old):
                name = name.replace(old, new, 1)
        for level in (2, 3, 4):
            name = name.replace(f"layer{level}.", f"stages.{level - 1}.", 1)
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            renamed[name] = value.shape
    assert renamed == {name: value.shape for name, value in own.items()}
    before = state_hash(network)
    network.train()(pictures(2, 3, 32, 32))
    assert state_hash(network) == before


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = small()
    assert torch.equal(torch.rand(1), expected)
    assert state_hash(one) == state_hash(small()) != state_hash(one.fresh(1))
    assert state_hash(one.fresh(0)) == state_hash(one)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"network": "resnet"}, "did you mean 'resnet"),
        ({"fusion": "product"}, "`fusion` is 'product'"),
        ({"width": 0}, "`width` is 0"),
        ({"levels": 0}, "`levels` is 0"),
        ({"network": "small", "pretrained": True}, "'small'"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        Translator(**settings)
