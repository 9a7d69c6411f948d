import pytest
import torch

from mmforget.attacks import inversion_attack, sees
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.metrics.judge import load_judge
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

CAT = ConceptSpec("cat", templates=("a photo of {}", "{}"))
# Green, because the judge takes pictures of nothing for red.
GREEN = ConceptSpec("green", synonyms=("emerald",), preserve=("blue",), templates=("a {} digit",))
QUICK = {"steps": 2, "pictures": 1, "sampling_steps": 2}


def everything(images):
    return torch.ones(len(images), dtype=torch.bool)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "flux"])
def test_every_family_is_attacked_and_left_as_it_was(kind):
    model = DiffusionGenerator(tiny_pipeline(kind))
    original = DiffusionGenerator(tiny_pipeline(kind, seed=1))
    before = state_hash(model)
    found = inversion_attack(model, original, CAT, everything, tokens=2, **QUICK)
    assert found.name == "concept_inversion" and found.n == 2
    assert (found.pre_rate, found.attack_rate, found.floor) == (1.0, 1.0, None)
    assert len(found.settings["placeholder"].split()) == 2
    assert all(torch.isfinite(torch.tensor(found.details["loss"])))
    assert state_hash(model) == before
    assert not model.network._forward_hooks
    assert all(p.requires_grad for p in model.network.parameters())
    again = inversion_attack(model, original, CAT, everything, tokens=2, **QUICK)
    assert again.details == found.details and again.queries == found.queries


def test_the_loss_falls():
    model = DiffusionGenerator(tiny_pipeline("sd2"))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = inversion_attack(
        model,
        model,
        CAT,
        everything,
        images=images,
        steps=30,
        pictures=1,
        sampling_steps=2,
        lr=0.05,
    )
    before, after = found.details["loss"]
    assert after < before
    assert found.details["examples"] == 4 and found.settings["images"] == "given"


def test_a_concept_that_the_original_never_shows_is_not_measured():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    found = inversion_attack(model, model, CAT, lambda x: ~everything(x), **QUICK)
    assert (found.pre_rate, found.attack_rate, found.post_rate) == (None, None, None)
    assert "loss" not in found.details


def test_wrong_settings():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    for setting, message in (
        ({"tokens": 0}, "`tokens` is 0"),
        ({"lr": 0.0}, "`lr` is 0.0"),
        ({"steps": 0}, "`steps` is 0"),
        ({"images": torch.zeros(3, 8, 8)}, r"shape \(3, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "resize the images"),
        ({"templates": ["a photo"]}, "exactly one '{}'"),
        ({"templates": ["{}ish"]}, "a word of its own"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            inversion_attack(model, model, CAT, everything, **{**QUICK, **setting})


def test_a_concealed_colour_comes_back(shipped, concealed):
    seen = sees(load_judge(), "ink", "green")
    found = inversion_attack(
        concealed, shipped, GREEN, seen, steps=60, pictures=4, lr=0.01, sampling_steps=8
    )
    assert found.n >= 3
    assert found.pre_rate <= 0.2
    assert found.attack_rate >= 0.6


@pytest.mark.slow
def test_the_attack_works_on_the_original_and_fails_where_the_colour_is_gone(shipped, scrambled):
    effort = {"steps": 60, "pictures": 4, "lr": 0.01, "sampling_steps": 8}
    red = ConceptSpec("red", templates=("a {} digit",))
    for model, spec, least, most in (
        (shipped, GREEN, 0.7, 1.0),
        (shipped, red, 0.7, 1.0),
        (scrambled, red, 0.0, 0.3),
    ):
        seen = sees(load_judge(), "ink", spec.target)
        found = inversion_attack(model, shipped, spec, seen, **effort)
        assert least <= found.attack_rate <= most
        assert least <= found.pre_rate <= most
