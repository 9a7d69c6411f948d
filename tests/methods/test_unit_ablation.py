"""UnitAblation: the right columns of the right layer, and nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from mmforget.concept import ConceptSpec
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.latent_sorting import sort_latents
from mmforget.methods.unit_ablation import UnitAblation
from mmforget.models.clip import load_clip
from mmforget.models.gan import ImageGAN
from mmforget.testing.generator_conformance import tiny_gan

FEW = {"pool": 48, "bearing": 0.5, "clear": 0.5, "samples": 8}


@pytest.fixture(scope="module")
def clip():
    return load_clip("digit_world")


def ablation(clip, model=None, **settings):
    model = model or tiny_gan()
    return UnitAblation(model, ConceptSpec("white"), clip, ["pink"], **(FEW | settings))


@pytest.mark.parametrize(("layer", "side"), [("ups.0", 0), ("to_image", 1)])
def test_only_the_columns_of_the_chosen_units_become_zero(clip, layer, side):
    method = ablation(clip, layer=layer, units=2)
    result = method.finalize()
    assert len(method.chosen) == 2
    for name, before in method._given[0].network.state_dict().items():
        after = result.network.state_dict()[name]
        if name != f"{layer}.weight":
            assert torch.equal(before, after)
            continue
        columns = before.transpose(0, side).clone()
        columns[list(method.chosen)] = 0
        assert torch.equal(after.transpose(0, side), columns)


def test_scores_are_those_of_switching_off_the_channels_themselves(clip):
    method = ablation(clip, layer="to_image", units=1)
    method.finalize()
    model, guide = tiny_gan(), method.guide
    records, _ = sort_latents(model, guide, model.draw(48, 0, purpose="-pool"), 0.5, 0.5)
    parts = {name: one.latents[:8] for name, one in records.items()}

    @torch.no_grad()
    def margin(name, unit=None):
        def switch_off(module, args):
            maps = args[0].clone()
            maps[:, unit] = 0
            return (maps,)

        layer = model.network.to_image
        handle = layer.register_forward_pre_hook(switch_off) if unit is not None else None
        found = guide.margins(guide.embed(model.synthesise(parts[name])))[:, 0].mean()
        if handle:
            handle.remove()
        return float(found)

    for unit in range(8):
        falls = {name: margin(name) - margin(name, unit) for name in parts}
        expected = falls["forget"] - falls["retain"]
        assert float(method.scores[unit]) == pytest.approx(expected, abs=1e-3)
    assert method.chosen == (int(method.scores.argmax()),)


def test_fewer_latents_show_the_concept_afterwards(clip):
    method = ablation(clip, layer="to_image", left=0.3, most=1.0)
    method.finalize()
    assert not method.no_op
    assert method.showing["after"] <= 0.3 < method.showing["before"]
    assert 1 <= len(method.chosen) <= 8
    assert method.statistics()["of"] == 8
    assert method.cost()["sample_passes"] > 0


def test_too_few_units_are_reported(clip, caplog):
    method = ablation(clip, layer="ups.0", left=0.0, most=0.01)
    with caplog.at_level(logging.WARNING):
        method.finalize()
    assert len(method.chosen) == 1
    assert "still show what" in caplog.text


def test_a_layer_that_reads_in_groups_is_refused(clip):
    network = nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)), nn.Upsample(size=8), nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    model = ImageGAN(network, latent_size=4)
    with pytest.raises(CapabilityError, match="'2' reads its channels in groups"):
        ablation(clip, model, layer="2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "ups.9"}, "`layer` is 'ups.9'"),
        ({"layer": "to_image", "units": 9}, "`units` is 9, but 'to_image' reads 8"),
        ({"units": 0}, "units"),
        ({"left": 1.0}, "`left` is 1.0"),
        ({"most": 0.0}, "`most` is 0.0"),
        ({"balance": -1.0}, "`balance` is -1.0"),
        ({"clear": 0.6}, "`clear` is 0.6"),
    ],
)
def test_bad_settings_are_refused(clip, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ablation(clip, **settings)
