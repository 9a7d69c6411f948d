"""SISS: importance weights, the mixture, and the balance of descent and ascent."""

from __future__ import annotations

import pytest
import torch

from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.errors import ConfigurationError, DataError
from mmforget.methods.siss import SISS, MixedPictures, importance
from mmforget.methods.surrogates import make_surrogates, ordinary_surrogates
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator
from mmforget.testing.concept_conformance import ConceptMethodChecks, tiny_generator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

FAST = {"lr": 1e-3, "retain_batch_size": 3, "batch_size": 3}
ORDINARY = ("a red cat", "a blue dog", "a house", "the street", "a horse", "a red car")


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=generator(seed, "test-pictures"))


def memories() -> MemorizedSet:
    one, other = pictures(2)
    return MemorizedSet(
        (
            MemorizedPrompt("a van gogh house", ("one",), "verbatim"),
            MemorizedPrompt("monet in the street", ("one", "other"), "template"),
        ),
        {"one": one, "other": other},
        retain=Captioned(ORDINARY, pictures(len(ORDINARY), 1)),
    )


def fitted(method, steps=3, **settings):
    quiet_trainer(max_steps=steps, **settings).fit(method)
    return method


CHECKS = ConceptMethodChecks(lambda model, _: SISS(model, memories(), **FAST), steps=6)


@pytest.mark.parametrize("name", ["given_model", "resume", "divergence"])
def test_conformance(name):
    CHECKS.run(name)


@pytest.mark.slow
def test_processes():
    CHECKS.run("processes")


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_weights_are_densities_over_that_of_the_mixture(share):
    draw = generator(0, "test-weights")
    keep, forget = torch.randn(2, 7, 3, generator=draw) * 0.7
    density = torch.distributions.Normal(0.0, 1.0)
    one, other = (density.log_prob(side).sum(1).exp() for side in (keep, forget))
    mixture = (1 - share) * one + share * other
    for found, wanted in zip(
        importance(keep, forget, share), (one / mixture, other / mixture), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_weights_are_finite_where_one_side_is_impossible():
    far, near = torch.full((1, 4), 1e4), torch.zeros(1, 4)
    assert [float(w) for w in importance(far, near, 0.5)] == [0.0, 2.0]
    assert [float(w) for w in importance(near, far, 0.5)] == [2.0, 0.0]


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
def test_a_noisy_picture_is_explained_by_both_sides(kind):
    """Both targets must lead back to the same noisy picture, and one of them is what was mixed."""
    model = DiffusionGenerator(tiny_pipeline(kind), steps=2)
    draw = generator(0, "test-sides")
    forget = torch.randn(1, *model.latent_shape, generator=draw)
    keep = torch.randn(2, *model.latent_shape, generator=draw)
    records = MixedPictures(model, forget, torch.tensor([1]), 0, [keep], 0.5)
    batch = records[list(range(40))]
    time, noisy = batch["time"], batch["noisy"]
    signal, level = (value.reshape(-1) for value in model._levels(time, noisy))
    noise = model.as_noise(batch["away"], noisy, time)
    back = model.noised(forget.expand_as(noisy), noise, time)
    torch.testing.assert_close(back, noisy, rtol=1e-3, atol=1e-3)
    noise = model.as_noise(batch["target"], noisy, time)
    kept = (noisy - level[:, None, None, None] * noise) / signal[:, None, None, None]
    usable = signal > 0.05
    distance = torch.cdist(kept.flatten(1), keep.flatten(1)).min(1).values
    assert float(distance[usable].max()) < 0.1
    # At little noise it is certain which side a picture comes from.
    certain = level < 0.3
    assert ((batch["forget_weight"] > 1.99) ^ (batch["keep_weight"] > 1.99))[certain].all()
    assert (batch["forget_weight"][certain] > 1.99).any()


# ---- training -----------------------------------------------------------------------------------


def test_the_ascent_has_its_share_of_the_gradient():
    model = tiny_generator()
    method = fitted(SISS(model, memories(), ascent=0.1, **FAST), steps=1)
    batch = {name: part[list(range(6))] for name, part in method.records.items()}
    terms = method.losses(batch)
    trained = [p for p in method.model.parameters() if p.requires_grad]

    def norm(term):
        found = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        return torch.cat([part.reshape(-1) for part in found if part is not None]).norm()

    torch.testing.assert_close(
        norm(terms["ascent"]), 0.1 * norm(terms["memory"]), rtol=1e-3, atol=1e-6
    )
    assert terms["ascent"] < 0


def test_naive_deletion_has_no_ascent_and_costs_less():
    model = tiny_generator()
    plain = fitted(SISS(model, memories(), ascent=0.0, **FAST), steps=2)
    assert float(plain.losses({n: r[[0, 1]] for n, r in plain.records.items()})["ascent"]) == 0
    whole = fitted(SISS(model, memories(), **FAST), steps=2)
    extra = whole.cost()["forget_sample_passes"] - plain.cost()["forget_sample_passes"]
    assert extra == 2 * 3 * 4


def test_every_pair_of_prompt_and_picture_is_served():
    method = fitted(SISS(tiny_generator(), memories(), **FAST), steps=1)
    records = method.records["memory"]
    assert len(records) == 3
    assert records.prompt.tolist() == [1, 2, 2]
    assert torch.equal(records.latents[0], records.latents[1])


def test_bad_settings_and_missing_pictures():
    model = tiny_generator()
    for settings, message in (
        ({"share": 0.0}, "`share` is 0.0"),
        ({"share": 1.0}, "`share` is 1.0"),
        ({"ascent": -1.0}, "`ascent` is -1.0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            SISS(model, memories(), **(FAST | settings))
    bare = MemorizedSet((MemorizedPrompt("a van gogh house"),), retain=memories().retain)
    with pytest.raises(DataError, match="has no picture"):
        SISS(model, bare, **FAST)
    with pytest.raises(DataError, match="no pictures for 'other'"):
        SISS(model, memories(), {"one": pictures(2)}, **FAST)
    with pytest.raises(DataError, match="must be"):
        SISS(model, memories(), {"one": pictures(2), "other": torch.rand(1, 3, 8, 8)}, **FAST)


# ---- surrogates ---------------------------------------------------------------------------------


class Brightness:
    """Calls pictures alike that are both bright at the top left."""

    def __init__(self, cut: float) -> None:
        self.cut = cut

    def __call__(self, generated, references, regions=None):
        assert generated.shape == references.shape
        assert regions is None or regions.shape == generated[:, 0].shape
        return (generated[:, :, :8, :8].mean((1, 2, 3)) > self.cut).float()


def test_surrogates_are_what_does_not_resemble_the_memories():
    model, cut = tiny_generator(), 0.5
    drawn = model.generate(memories().texts, n=8, seed=3)
    cut = float(drawn[:, :, :8, :8].mean((1, 2, 3)).median())
    found = make_surrogates(model, memories(), Brightness(cut), count=4, seed=0)
    assert set(found) == {"one", "other"}
    for images in found.values():
        assert 1 <= len(images) <= 4
        assert (images[:, :, :8, :8].mean((1, 2, 3)) <= cut).all()
    again = make_surrogates(model, memories(), Brightness(cut), count=4, seed=0)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_model_that_only_copies_gives_no_surrogates():
    with pytest.raises(DataError, match="all 4 pictures drawn for 'one' resemble it"):
        make_surrogates(tiny_generator(), memories(), Brightness(-1.0), count=2, tries=2)
    with pytest.raises(ConfigurationError, match="`count` is 0"):
        make_surrogates(tiny_generator(), memories(), Brightness(0.5), count=0)


def test_ordinary_surrogates_are_ordinary_pictures():
    found = ordinary_surrogates(memories(), count=3)
    retained = memories().retain.images
    for images in found.values():
        assert images.shape == (3, 3, 16, 16)
        assert all((retained == one).flatten(1).all(1).any() for one in images)
    captions = MemorizedSet(memories().prompts, memories().images, retain=Captioned(("a", "b")))
    with pytest.raises(DataError, match="has no pictures to deal out"):
        ordinary_surrogates(captions)
