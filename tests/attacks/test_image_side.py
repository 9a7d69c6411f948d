import pytest
import torch

from mmforget.attacks import latent_inversion_attack, sdedit_attack, sees
from mmforget.attacks.image_side import latents_to_noise, partly_noised
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.metrics.judge import load_judge
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

CAT = ConceptSpec("cat", preserve=("dog",), templates=("a photo of {}",))
# Green, because the judge takes pictures of nothing for red.
GREEN = ConceptSpec("green", preserve=("blue",), templates=("a {} digit",))
KINDS = ("sd", "sd2", "sdxl", "sd3", "flux")
ATTACKS = (sdedit_attack, latent_inversion_attack)


def everything(images):
    return torch.ones(len(images), dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_leads_back_to_the_picture(kind):
    model = DiffusionGenerator(tiny_pipeline(kind))
    if model.prediction == "epsilon":
        # A random network that answers pure noise loudly has no well-conditioned inverse.
        with torch.no_grad():
            model.network.conv_out.weight.mul_(0.2)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *model.latent_shape), generator=draw)
    embedding = model.encode(["a cat", "a dog"])
    with torch.no_grad():
        noise = latents_to_noise(model, latents, embedding, 10)
        back = model.sample(noise, embedding, model.unconditional(), steps=10, guidance=1.0)
        other = model.sample(
            torch.randn(noise.shape, generator=draw),
            embedding,
            model.unconditional(),
            steps=10,
            guidance=1.0,
        )
    own = (back - latents).square().mean()
    assert own < 0.02 * latents.square().mean()
    assert own < 0.05 * (other - latents).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_starts_at_the_level_that_it_would_have_reached(kind):
    model = DiffusionGenerator(tiny_pipeline(kind))
    scheduler, times = model.schedule(10, torch.zeros(1, *model.latent_shape))
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn((1, *model.latent_shape), generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    started = partly_noised(model, latents, noise, 10, 6)
    # On the scale of the network, it must be the mixture that the network was trained on.
    if hasattr(scheduler, "scale_model_input"):
        started = scheduler.scale_model_input(started, times[6])
    assert torch.allclose(started, model.noised(latents, noise, times[6:7]), atol=1e-5)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_is_attacked_and_left_as_it_was(attack, kind):
    model = DiffusionGenerator(tiny_pipeline(kind))
    original = DiffusionGenerator(tiny_pipeline(kind, seed=1))
    before = state_hash(model)
    found = attack(model, original, CAT, everything, pictures=1, sampling_steps=3)
    assert (found.n, found.attack_rate, found.post_rate) == (1, 1.0, 1.0)
    # The judge also sees the concept on the unrelated pictures, so that there is no floor.
    assert found.floor is None and any("no floor" in note for note in found.notes)
    assert all(row["reference"] is None for row in found.details["conditions"].values())
    assert state_hash(model) == before
    assert (
        attack(model, original, CAT, everything, pictures=1, sampling_steps=3).queries
        == found.queries
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_concept_that_the_original_never_shows_is_not_measured(attack):
    model = DiffusionGenerator(tiny_pipeline("sd"))
    found = attack(model, model, CAT, lambda x: ~everything(x), pictures=1)
    assert (found.n, found.pre_rate, found.attack_rate, found.floor) == (0, None, None, None)
    assert found.details["conditions"] == {}


def test_wrong_settings():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    for strengths in ((0.0,), (0.5, 1.0)):
        with pytest.raises(ConfigurationError, match="`strengths` has"):
            sdedit_attack(model, model, CAT, everything, strengths=strengths)
    with pytest.raises(ConfigurationError, match="`budget` is 'huge'"):
        sdedit_attack(model, model, CAT, everything, budget="huge")
    with pytest.raises(ConfigurationError, match="`pictures` is 0"):
        latent_inversion_attack(model, model, CAT, everything, pictures=0)


def test_the_lower_the_strength_the_more_of_the_picture_stays(shipped):
    seen = sees(load_judge(), "ink", "green")
    found = sdedit_attack(
        shipped,
        shipped,
        GREEN,
        seen,
        strengths=(0.3, 0.9),
        pictures=4,
        sampling_steps=8,
        reference=shipped.fresh(0),
    )
    rates = found.details["conditions"]
    assert rates["concept 0.9"]["attack"] >= 0.8  # the prompt alone suffices
    assert rates["empty 0.3"]["attack"] >= 0.8
    assert rates["empty 0.9"]["attack"] < rates["empty 0.3"]["attack"]
    assert rates["empty 0.3"]["floor"] <= 0.2
    assert rates["concept 0.9"]["reference"] <= 0.4


def test_latent_inversion_finds_the_colour_but_not_in_other_pictures(shipped):
    seen = sees(load_judge(), "ink", "green")
    found = latent_inversion_attack(shipped, shipped, GREEN, seen, pictures=3, sampling_steps=6)
    rates = found.details["conditions"]
    assert set(rates) == {"concept", "empty", "empty exact"}
    assert found.attack_rate >= 0.6 and rates["empty"]["attack"] >= 0.6
    assert rates["empty"]["floor"] <= 0.4
    assert found.floor == rates["concept"]["floor"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_cannot_be_drawn_does_not_come_back_and_what_is_concealed_does(
    attack, shipped, concealed, scrambled
):
    effort = {"pictures": 4, "sampling_steps": 8}
    red = ConceptSpec("red", preserve=("blue",), templates=("a {} digit",))
    gone = attack(
        scrambled, shipped, red, sees(load_judge(), "ink", "red"), reference=scrambled, **effort
    )
    assert gone.pre_rate <= 0.3 and gone.attack_rate <= 0.3
    for rates in gone.details["conditions"].values():
        assert rates["reference"] == rates["attack"]
    hidden = attack(concealed, shipped, GREEN, sees(load_judge(), "ink", "green"), **effort)
    assert hidden.pre_rate <= 0.3 and hidden.attack_rate >= 0.7
