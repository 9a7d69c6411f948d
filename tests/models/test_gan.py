"""Generators behind one contract: latents, pictures, training, saving."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from mmforget import DigitWorld, ImageGAN, load_gan
from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    MissingFileError,
    ModelError,
    WeightsError,
)
from mmforget.models.base import Generates, HasLatents, Latents, Sites, state_hash
from mmforget.models.generators.dcgan import DCGAN
from mmforget.models.generators.discriminator import ProjectionDiscriminator

TINY = {"latent_size": 8, "channels": (16, 8, 8, 8)}


class Grey(nn.Module):
    """A user's network: one channel, values in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 64)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layer(latents).sigmoid().view(-1, 1, 8, 8)


class OneHot(nn.Module):
    """A user's network with classes as numbers of a vector."""

    latent_size, num_classes = 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3 * 16)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return self.layer(torch.cat([latents, labels], 1)).tanh().view(-1, 3, 4, 4)


class Styled(nn.Module):
    """A style-based network in its smallest form: two layers, each with a style."""

    latent_size, num_ws, style_size = 4, 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.synthesis = nn.Linear(4, 3), nn.Linear(6, 3 * 16)

    def map_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.mapping(latents)

    def synthesise(self, styles: Tensor, noise: str = "constant") -> Tensor:
        return self.synthesis(styles.flatten(1)).tanh().view(-1, 3, 4, 4)

    def mean_style(self) -> Tensor:
        return torch.zeros(3)


class StopAndSave(Callback):
    """Ends a training after its first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture
def tiny() -> ImageGAN:
    return ImageGAN("dcgan", network_args=dict(TINY)).fresh(0).eval()


@pytest.fixture
def classes() -> ImageGAN:
    args = dict(TINY, num_classes=3)
    return ImageGAN("dcgan", network_args=args, class_names=("a", "b", "c")).fresh(0).eval()


def test_it_offers_what_methods_ask_for(tiny: ImageGAN) -> None:
    assert isinstance(tiny, Generates)
    assert isinstance(tiny, HasLatents)
    assert isinstance(tiny, Sites)
    assert [site.name for site in tiny.sites("all")] == ["first", "ups.0", "ups.1", "ups.2",
                                                        "to_image"]  # fmt: skip
    with pytest.raises(CapabilityError, match="ffn"):
        tiny.sites("ffn")


def test_a_picture_depends_on_seed_and_number_only(tiny: ImageGAN) -> None:
    eight, four = tiny.generate([""], 8, seed=3), tiny.generate([""], 4, seed=3)
    assert eight.shape == (8, 3, 32, 32)
    assert torch.equal(eight[:4], four)
    assert torch.equal(tiny.pictures(tiny.draw(4, 3, first=4)), eight[4:])
    assert not torch.equal(tiny.generate([""], 4, seed=4), four)
    assert 0 <= float(eight.min()) <= float(eight.max()) <= 1
    assert not torch.equal(tiny.draw(1, 0).codes, tiny.draw(1, 0, purpose="-audit").codes)


def test_drawing_changes_nothing_also_in_training_mode(tiny: ImageGAN) -> None:
    before = state_hash(tiny)
    tiny.train()
    ImageGAN(tiny.network, latent_size=8)  # draws one picture to learn the size
    tiny.generate([""], 4, 0)
    assert state_hash(tiny) == before
    assert tiny.training


def test_classes_are_named_and_drawn_at_random_without_a_name(classes: ImageGAN) -> None:
    pictures = classes.generate(["b", ""], 4, seed=0)
    latents = classes.draw(4, 0, labels=torch.ones(4, dtype=torch.int64))
    assert torch.equal(pictures[:4], classes.pictures(latents))
    labels = classes.draw(300, 0).labels
    assert labels is not None and set(labels.tolist()) == {0, 1, 2}
    with pytest.raises(ConfigurationError, match="'d'"):
        classes.generate(["d"], 1, 0)
    with pytest.raises(ModelError, match="labels"):
        classes.synthesise(Latents(torch.zeros(1, 8)))


def test_the_class_changes_the_picture_once_its_rows_differ(classes: ImageGAN) -> None:
    with torch.no_grad():
        classes.network.norms[1].shift.weight[2] += 3
    codes = torch.randn(2, 8)
    first, other = (classes.synthesise(Latents(codes, torch.full((2,), c))) for c in (0, 2))
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("prior", ["normal", "uniform", "truncated_normal"])
def test_latents_follow_the_prior(prior: Any) -> None:
    model = ImageGAN("dcgan", network_args=dict(TINY), prior=prior, truncation=0.5)
    codes = model.draw(2000, 0).codes
    expected = {"normal": 1.0, "uniform": 1 / 3**0.5, "truncated_normal": 0.283}[prior]
    assert float(codes.std()) == pytest.approx(expected, rel=0.05)
    if prior != "normal":
        assert float(codes.abs().max()) <= (1 if prior == "uniform" else 0.5)


def test_one_channel_and_unit_range_become_three_channels_in_unit_range() -> None:
    model = ImageGAN(Grey(), latent_size=4, value_range="unit")
    images = model.generate([""], 3, 0)
    assert images.shape == (3, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    raw = model.network(model.draw(3, 0).codes)
    assert torch.equal(images[:, :1], raw)


def test_labels_can_be_one_hot() -> None:
    model = ImageGAN(OneHot(), label_format="one_hot")
    latents = model.draw(2, 0, labels=torch.tensor([0, 2]))
    hot = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    expected = (model.network(latents.codes, hot) + 1) / 2
    assert torch.equal(model.synthesise(latents), expected)


def test_style_based_networks_have_three_spaces() -> None:
    model = ImageGAN(Styled())
    assert model.latent_spaces == ("z", "w", "w+")
    z = model.draw(2, 0)
    w, plus = model.mapped(z, "w"), model.mapped(z)
    assert w.codes.shape == (2, 3) and plus.codes.shape == (2, 2, 3)
    assert torch.equal(model.synthesise(z), model.synthesise(plus))
    assert torch.equal(model.synthesise(w), model.synthesise(plus))
    with pytest.raises(CapabilityError, match="'w'"):
        model.mapped(w, "z")


def test_spaces_of_plain_networks_are_refused(tiny: ImageGAN) -> None:
    with pytest.raises(CapabilityError, match=r"'w\+'"):
        tiny.mapped(tiny.draw(1, 0), "w+")


def test_layer_groups_hold_every_parameter_once(tiny: ImageGAN) -> None:
    for model in (tiny, ImageGAN(Grey(), latent_size=4)):
        named = [name for names in model.layer_groups().values() for name in names]
        assert sorted(named) == sorted(name for name, _ in model.network.named_parameters())
    assert list(tiny.layer_groups()) == ["first", "block.0", "block.1", "block.2", "to_image"]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prior": "gauss"}, "normal"),
        ({"value_range": "0-255"}, "value_range"),
        ({"label_format": "text"}, "label_format"),
        ({"lr": 0.0}, "lr"),
        ({"averaging": 0.0}, "averaging"),
        ({"beta1": 1.0}, "beta1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ImageGAN("dcgan", **settings)


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="latent_size"):
        ImageGAN(Grey())
    with pytest.raises(ModelError, match="5 numbers"):
        ImageGAN(Grey(), latent_size=5)
    with pytest.raises(ModelError, match=r"\(1, 64\)"):
        ImageGAN(nn.Linear(4, 64), latent_size=4)
    with pytest.raises(ModelError, match="class_names"):
        ImageGAN("dcgan", network_args=dict(TINY, num_classes=3), class_names=("a", "b"))
    with pytest.raises(ModelError, match="image_channels"):
        DCGAN(image_channels=2)
    with pytest.raises(ModelError, match="12 pixels"):
        ProjectionDiscriminator(12)


def test_a_collapsed_generator_is_refused(tiny: ImageGAN) -> None:
    with torch.no_grad():
        tiny.network.to_image.weight.zero_()
    with pytest.raises(ModelError, match="collapsed"):
        tiny.check_drawing()


def test_saturated_and_infinite_pictures_are_refused() -> None:
    model = ImageGAN("dcgan", network_args=dict(TINY)).fresh(0).eval()
    with torch.no_grad():
        model.network.to_image.weight.mul_(1e6)
    with pytest.raises(ModelError, match="saturated"):
        model.check_drawing()
    with torch.no_grad():
        model.network.to_image.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        model.check_drawing()


def test_a_wrong_range_is_noticed() -> None:
    model = ImageGAN(OneHot(), label_format="one_hot", value_range="unit")
    with torch.no_grad():
        model.network.layer.weight.mul_(3)
    with pytest.raises(ModelError, match="'tanh'"):
        model.check_drawing()


def test_missing_folders_and_unsafe_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="gan_conditional"):
        load_gan(tmp_path / "nothing.d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="generator\\.json"):
        load_gan(tmp_path / "empty")
    torch.save(DCGAN(**TINY), tmp_path / "module.pth")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="would execute code"):
        load_gan(tmp_path / "module.pth", "dcgan", network_args=dict(TINY))


# ---- saving --------------------------------------------------------------------------------------


def test_a_saved_generator_comes_back_bit_by_bit(classes: ImageGAN, tmp_path: Path) -> None:
    classes.save_native(tmp_path)
    again = load_gan(tmp_path, check=False)
    assert again.class_names == ("a", "b", "c")
    assert state_hash(again) == state_hash(classes)
    assert torch.equal(again.generate(["c"], 4, 1), classes.generate(["c"], 4, 1))


def test_a_user_network_needs_to_be_given_again(tmp_path: Path) -> None:
    model = ImageGAN(Grey(), latent_size=4, value_range="unit")
    model.save_native(tmp_path)
    with pytest.raises(ModelError, match="give it as `network`"):
        load_gan(tmp_path)
    again = load_gan(tmp_path, Grey(), check=False)
    assert torch.equal(again.generate([""], 2, 0), model.generate([""], 2, 0))


def test_plain_state_dicts_load_into_a_named_network(tiny: ImageGAN, tmp_path: Path) -> None:
    torch.save(tiny.network.state_dict(), tmp_path / "generator.pth")
    again = load_gan(tmp_path / "generator.pth", "dcgan", network_args=dict(TINY), check=False)
    assert torch.equal(again.generate([""], 2, 0), tiny.generate([""], 2, 0))


def test_the_discriminator_is_kept_beside_it(tiny: ImageGAN, tmp_path: Path) -> None:
    with_it, without = tmp_path / "with", tmp_path / "without"
    with_it.mkdir()
    without.mkdir()
    tiny.save_native(without)
    with pytest.raises(MissingFileError, match="discriminator"):
        load_gan(without, discriminator=True, check=False)
    tiny.discriminator = tiny.new_discriminator().eval()
    tiny.save_native(with_it)
    again = load_gan(with_it, discriminator=True, check=False)
    assert again.discriminator is not None
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.discriminator(images), tiny.discriminator(images))
    assert load_gan(with_it, check=False).discriminator is None


@pytest.mark.slow
def test_the_program_runs_without_mmforget(classes: ImageGAN, tmp_path: Path) -> None:
    classes.save_program(tmp_path)
    latents = classes.draw(5, 7)
    expected = classes.network(latents.codes, latents.labels)
    torch.save([latents.codes, latents.labels, expected.detach()], tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["mmforget"] = None
import torch
codes, labels, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
found = torch.export.load({str(tmp_path / "generator.pt2")!r}).module()(codes, labels)
assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- training ------------------------------------------------------------------------------------


def trained(
    quiet_trainer: Callable[..., Trainer], tiny_data: DigitWorld, **settings: Any
) -> ImageGAN:
    model = ImageGAN("dcgan", network_args=dict(TINY), discriminator={"channels": (8, 8, 8)})
    model = model.fresh(0)
    quiet_trainer(max_epochs=2, **settings).fit(model, tiny_data)
    return model


def test_training_leaves_the_average_with_its_own_statistics(
    quiet_trainer: Callable[..., Trainer], tiny_data: DigitWorld
) -> None:
    start = ImageGAN("dcgan", network_args=dict(TINY)).fresh(0)
    model = trained(quiet_trainer, tiny_data)
    change = (model.network.first.weight - start.network.first.weight).abs().max()
    # With a step of 0.005 the average has hardly left the start; the weights have moved 4e-4 a step
    assert 0 < float(change) < 4e-4
    assert model._average is None and model.discriminator is not None
    norm = model.network.norms[0]
    maps = model.network.first(model.draw(2000, 5).codes).unflatten(1, (-1, 4, 4))
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)), atol=0.05)
    assert torch.allclose(norm.running_var, maps.var((0, 2, 3)), rtol=0.2)


def test_training_is_the_same_for_the_same_seed(
    quiet_trainer: Callable[..., Trainer], tiny_data: DigitWorld
) -> None:
    assert state_hash(trained(quiet_trainer, tiny_data)) == state_hash(
        trained(quiet_trainer, tiny_data)
    )


def test_a_stopped_training_goes_on_to_the_same_weights(
    quiet_trainer: Callable[..., Trainer], tiny_data: DigitWorld, tmp_path: Path
) -> None:
    def new() -> ImageGAN:
        made = ImageGAN("dcgan", network_args=dict(TINY), discriminator={"channels": (8, 8, 8)})
        return made.fresh(0)

    whole, first, second = new(), new(), new()
    quiet_trainer(max_epochs=2).fit(whole, tiny_data)
    # The learning rate follows the whole length, so the first half is stopped from outside.
    trainer = quiet_trainer(max_epochs=2, callbacks=[StopAndSave(tmp_path / "half.ckpt")])
    trainer.fit(first, tiny_data)
    quiet_trainer(max_epochs=2).fit(
        second, tiny_data, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert state_hash(second) == state_hash(whole)


def test_data_of_another_size_is_refused(
    quiet_trainer: Callable[..., Trainer], tiny_data: DigitWorld
) -> None:
    model = ImageGAN("dcgan", network_args={"latent_size": 8, "channels": (16, 8, 8)})
    with pytest.raises(ModelError, match=r"\(32, 32\)"):
        quiet_trainer().fit(model, tiny_data)


# ---- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gan", "gan_conditional"])
def test_the_shipped_generators_draw_what_they_were_trained_on(name: str) -> None:
    from mmforget import load_judge

    model = load_gan(name)
    judge = load_judge()
    found = judge(model.pictures(model.draw(300, 5)))
    for factor in ("digit", "ink"):
        shares = found[factor].argmax(1).bincount(minlength=len(judge.factors[factor])) / 300
        assert float(shares.min()) > 0.25 / len(judge.factors[factor])
    if name == "gan_conditional":
        sevens = judge(model.generate(["seven"], 100, 5))["digit"].argmax(1)
        # Its class tables only scale and shift: half of the pictures obey, ten times the chance
        # of another class.
        assert float((sevens == 7).double().mean()) > 0.35


def test_the_shipped_generators_are_small_and_documented() -> None:
    folder = Path(str(__import__("mmforget").__path__[0])) / "assets" / "digit_world"
    for name in ("gan", "gan_conditional", "gan_without_seven", "gan_without_red"):
        size = sum(file.stat().st_size for file in (folder / name).iterdir())
        record = json.loads((folder / name / "training.json").read_text())
        assert size < 4e6
        assert record["command"].endswith(f"train_gan_assets.py {name}")
