"""BigGAN-deep draws what the published PyTorch code draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.errors import MissingFileError, ModelError, WeightsError
from mmforget.models.gan_files import load_gan
from mmforget.models.generators.biggan_deep import Attention, BigGANDeep, Standing
from mmforget.models.generators.checkpoints import export_like, read_checkpoint

LATENTS = torch.sin(torch.arange(16.0) * 1.3).reshape(2, 8) * 1.5
LABELS = torch.eye(5)[torch.tensor([1, 4])]
DRAWN = {
    1.0: [-0.35041, 0.11835, 0.50847, 0.12214, 0.14341, -0.47857, 0.11505],
    0.5: [-0.02504, 0.1668, 0.30744, 0.09062, 0.12318, -0.25049, 0.08631],
}


def some(images: Tensor) -> Tensor:
    """Seven values spread over a batch."""
    values = images.flatten()
    return values[:: len(values) // 7][:7]


@pytest.mark.parametrize("truncation", [1.0, 0.5])
@torch.no_grad()
def test_it_draws_what_the_published_code_draws(
    biggan_deep_folder: Path, truncation: float
) -> None:
    model = load_gan(biggan_deep_folder / "pytorch_model.bin", check=False)
    model.network.truncation = truncation
    # drawn by pytorch-pretrained-biggan 0.1.1 from the same weights, latents times truncation
    expected = torch.tensor(DRAWN[truncation])
    torch.testing.assert_close(some(model.network(LATENTS, LABELS)), expected, rtol=0, atol=1e-4)
    assert (model.prior, model.truncation, model.num_classes) == ("truncated_normal", 2.0, 5)
    assert model.draw(64, 0).codes.abs().max() <= 2


@torch.no_grad()
def test_an_exported_file_draws_the_same(biggan_deep_folder: Path, tmp_path: Path) -> None:
    path = biggan_deep_folder / "pytorch_model.bin"
    model = load_gan(path, check=False)
    model.network.to_image.bias += 0.1
    model.network.first.weight *= 1.5
    written = export_like(model, path, tmp_path / "new.pt")
    names = set(torch.load(path, weights_only=True))
    content = torch.load(written, weights_only=True)
    assert set(content) == names
    written.replace(path)
    again = load_gan(path, check=False)
    torch.testing.assert_close(
        again.network(LATENTS, LABELS), model.network(LATENTS, LABELS), rtol=0, atol=1e-5
    )


def test_the_folder_is_read_too_and_needs_its_configuration(biggan_deep_folder: Path) -> None:
    assert read_checkpoint(biggan_deep_folder).network == "biggan_deep"
    (biggan_deep_folder / "config.json").write_text(json.dumps({"layers": [3]}))
    with pytest.raises(ModelError, match="does not describe a BigGAN-deep"):
        read_checkpoint(biggan_deep_folder)
    (biggan_deep_folder / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json"):
        read_checkpoint(biggan_deep_folder)


def test_a_file_that_lacks_a_weight_is_refused(biggan_deep_folder: Path) -> None:
    path = biggan_deep_folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    del weights["generator.layers.2.gamma"]
    torch.save(weights, path)
    with pytest.raises(WeightsError, match=r"layers\.2\.strength"):
        load_gan(path)
    del weights["generator.bn.running_means"]
    torch.save(weights, path)
    with pytest.raises(WeightsError, match=r"generator\.bn\.running_means|norm\.running_means"):
        load_gan(path)


@torch.no_grad()
def test_statistics_between_two_truncations_are_mixed() -> None:
    norm = Standing(2, 0, 3, eps=0.0)
    norm.running_means.copy_(torch.tensor([[0.0, 0], [1, 2], [3, 4]]))
    maps = torch.zeros(1, 2, 1, 1)
    nothing = torch.zeros(1, 0)
    for truncation, mean in ((0.0, [0.0, 0]), (0.5, [1, 2]), (0.75, [2, 3]), (1.0, [3, 4])):
        found = norm(maps, nothing, truncation).flatten()
        torch.testing.assert_close(found, -torch.tensor(mean, dtype=torch.float32))


@torch.no_grad()
def test_attention_is_the_weighted_mean_of_values() -> None:
    torch.manual_seed(0)
    layer = Attention(8)
    layer.strength.fill_(1.0)
    maps = torch.randn(1, 8, 2, 2)
    # on 2x2 maps there is one pooled place, so that every place sees its value
    pooled = layer.value(maps).amax(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(
        layer(maps, maps, 1.0), maps + layer.out(pooled.expand(-1, -1, 2, 2))
    )


def test_groups_cover_every_parameter_once(biggan_deep_folder: Path) -> None:
    network = load_gan(biggan_deep_folder / "pytorch_model.bin", check=False).network
    groups = network.layer_groups()
    assert list(groups)[:5] == ["embedding", "first", "block.0", "block.1", "attention"]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())


def test_sizes_that_cannot_be_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"truncation": 1.5}, "truncation"),
        ({"width": 6}, "width"),
        ({"attention": 12}, "attention"),
        ({"num_classes": 0}, "num_classes"),
    ]
    for arguments, name in wrong:
        with pytest.raises(ModelError, match=name):
            BigGANDeep(**arguments)
