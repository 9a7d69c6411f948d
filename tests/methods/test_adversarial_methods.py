"""ParameterExtrapolation and AdaptThenUnlearn: their losses, stages and settings."""

from __future__ import annotations

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.erase import run_method
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.adapt_then_unlearn import AdaptThenUnlearn
from mmforget.methods.adversarial_adaptation import fisher, hinge_terms
from mmforget.methods.parameter_extrapolation import ParameterExtrapolation
from mmforget.models.base import state_hash
from mmforget.models.gan import ImageGAN
from mmforget.testing.colour_world import ColourClip, colour_gan

RED = ConceptSpec("red")
OTHERS = ["green", "blue"]
FAST = {"pool": 128, "batch_size": 8, "lr": 1e-2}


def made(cls, model: ImageGAN, **settings):
    plain = FAST | ({"adapt_steps": 4, "copies": 1} if cls is AdaptThenUnlearn else {})
    return cls(model, RED, [ColourClip()], OTHERS, **(plain | settings))


# ---- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [False, True])
def test_hinge_losses_are_those_of_two_separate_passes(classes):
    model = colour_gan(classes, discriminator=True)
    latents = model.draw(5, 0)
    real = torch.rand(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 0]) if classes else None
    on_real, on_fake, fooled = hinge_terms(model, latents, real, labels)
    with torch.no_grad():
        of_real = model.discriminator(real * 2 - 1, labels)
        of_fake = model.discriminator(model.synthesise(latents) * 2 - 1, latents.labels)
    torch.testing.assert_close(on_real.detach(), torch.relu(1 - of_real))
    torch.testing.assert_close(on_fake.detach(), torch.relu(1 + of_fake))
    torch.testing.assert_close(fooled.detach(), -of_fake)


def test_each_loss_reaches_its_own_network_only():
    model = colour_gan(discriminator=True)
    latents, real = model.draw(4, 0), torch.rand(4, 3, 8, 8)
    on_real, on_fake, _ = hinge_terms(model, latents, real)
    (on_real.mean() + on_fake.mean()).backward()
    assert all(p.grad is None for p in model.network.parameters())
    assert any(p.grad is not None for p in model.discriminator.parameters())
    model.zero_grad(set_to_none=True)
    hinge_terms(model, latents, real)[2].mean().backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    assert all(p.grad is not None for p in model.network.parameters())


def test_fisher_is_the_relative_squared_gradient():
    model = colour_gan(discriminator=True)
    latents = model.draw(32, 0)
    names = [name for name, _ in model.network.named_parameters()]
    found = fisher(model, latents, names)
    squares = {name: 0.0 for name in names}
    for part in (latents[:16], latents[16:]):
        loss = -model.discriminator(model.synthesise(part) * 2 - 1).mean()
        for name, grad in zip(
            names, torch.autograd.grad(loss, list(model.network.parameters())), strict=True
        ):
            squares[name] = squares[name] + grad.square()
    mean = torch.cat([value.flatten() for value in squares.values()]).mean()
    for name in names:
        torch.testing.assert_close(found[name], squares[name] / mean)
    assert torch.cat([value.flatten() for value in found.values()]).mean() == pytest.approx(1.0)


# ---- extrapolation ------------------------------------------------------------------------------


def test_the_result_lies_opposite_to_the_adapted_weights():
    model = colour_gan(discriminator=True)
    start = {name: value.detach().clone() for name, value in model.network.named_parameters()}
    method = made(ParameterExtrapolation, model, strength=0.25)
    adapted: dict[str, torch.Tensor] = {}
    inner = method.edit

    def watched() -> None:
        adapted.update({n: p.detach().clone() for n, p in method.model.network.named_parameters()})
        inner()

    method.edit = watched
    after = run_method(method, 5, progress=False)
    for name, value in after.network.named_parameters():
        assert not torch.equal(adapted[name], start[name])
        torch.testing.assert_close(value, start[name] - 0.25 * (adapted[name] - start[name]))
    assert state_hash(after.discriminator) == state_hash(model.discriminator)


def test_adaptation_draws_more_of_the_concept_and_extrapolation_less():
    model = colour_gan(discriminator=True)
    latents = model.draw(200, 9)

    def red(one: ImageGAN) -> float:
        images = one.pictures(latents)
        return float((images[:, 0] - images[:, 1:].mean(1)).mean())

    method = made(ParameterExtrapolation, model, ewc_weight=0.0, strength=0.5)
    adapted: list[float] = []
    inner = method.edit

    def watched() -> None:
        adapted.append(red(method.model))
        inner()

    method.edit = watched
    after = run_method(method, 60, progress=False)
    assert adapted[0] > red(model) > red(after)


# ---- adapt, then unlearn ------------------------------------------------------------------------


@pytest.mark.parametrize("repulsion", ["exponential", "inverse", "negative"])
def test_weights_are_pushed_from_the_adapted_ones(repulsion):
    """With a heavy push, further than without any."""
    model = colour_gan(discriminator=True)

    def distance(weight: float) -> float:
        method = made(AdaptThenUnlearn, model, repulsion=repulsion, repulsion_weight=weight)
        after = run_method(method, 12, progress=False)
        weights = dict(after.network.named_parameters())
        return float(method._apart(weights, method._adapted[0]).detach())

    assert distance(100.0) > distance(0.0)


def test_copies_of_stage_one_differ_and_are_the_same_at_every_start():
    model = colour_gan(discriminator=True)
    first, second = (made(AdaptThenUnlearn, model, copies=2) for _ in range(2))
    for method in (first, second):
        run_method(method, 1, progress=False)
    name = "colour.weight"
    assert not torch.equal(first._adapted[0][name], first._adapted[1][name])
    for one, other in zip(first._adapted, second._adapted, strict=True):
        assert torch.equal(one[name], other[name])
    assert len(first.statistics()["adapted_distances"]) == 2


def test_given_pictures_replace_those_that_the_guide_finds():
    model = colour_gan(discriminator=True)
    negatives = torch.zeros(20, 3, 8, 8)
    negatives[:, 2] = 1
    with_given = made(AdaptThenUnlearn, model, negatives=negatives)
    run_method(with_given, 1, progress=False)
    batch = with_given.records["forget"][[3]]
    torch.testing.assert_close(with_given.real(batch), negatives[:1])
    plain = made(AdaptThenUnlearn, model)
    run_method(plain, 1, progress=False)
    name = "colour.weight"
    assert not torch.equal(plain._adapted[0][name], with_given._adapted[0][name])


def test_retaining_keeps_clear_pictures_closer():
    model = colour_gan(discriminator=True)

    def drift(weight: float) -> float:
        method = made(AdaptThenUnlearn, model, retain_weight=weight)
        after = run_method(method, 15, progress=False)
        clear = method.records["retain"].latents
        return float((after.pictures(clear) - model.pictures(clear)).square().mean())

    assert drift(100.0) < drift(0.0)


# ---- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ParameterExtrapolation, AdaptThenUnlearn])
def test_the_given_model_is_untouched_and_the_same_seed_gives_the_same(cls):
    model = colour_gan(discriminator=True)
    start = state_hash(model)
    first, second = (run_method(made(cls, model), 3, progress=False) for _ in range(2))
    assert state_hash(model) == start
    assert state_hash(first) == state_hash(second) != start
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("cls", [ParameterExtrapolation, AdaptThenUnlearn])
def test_layers_that_are_not_named_stay_bit_by_bit(cls):
    model = colour_gan(discriminator=True)
    after = run_method(made(cls, model, train_layers="colour"), 3, progress=False)
    for name, value in after.network.named_parameters():
        same = torch.equal(value, model.network.get_parameter(name))
        assert same == (not name.startswith("colour"))


@pytest.mark.parametrize("cls", [ParameterExtrapolation, AdaptThenUnlearn])
def test_a_generator_without_discriminator_is_refused(cls):
    with pytest.raises(CapabilityError, match="discriminator=True"):
        made(cls, colour_gan())


@pytest.mark.parametrize(
    ("cls", "settings", "match"),
    [
        (ParameterExtrapolation, {"strength": 0.0}, "`strength`"),
        (ParameterExtrapolation, {"ewc_weight": -1.0}, "`ewc_weight`"),
        (ParameterExtrapolation, {"negatives": torch.rand(2, 3, 4, 4)}, "`negatives`"),
        (AdaptThenUnlearn, {"repulsion": "exponent"}, "did you mean 'exponential'"),
        (AdaptThenUnlearn, {"copies": 0}, "`copies`"),
        (AdaptThenUnlearn, {"alpha": 0.0}, "`alpha`"),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, match):
    with pytest.raises(ConfigurationError, match=match):
        made(cls, colour_gan(discriminator=True), **settings)


def test_given_pictures_do_not_go_with_classes():
    with pytest.raises(ConfigurationError, match="without classes"):
        made(
            AdaptThenUnlearn, colour_gan(True, discriminator=True),
            negatives=torch.rand(2, 3, 8, 8),
        )  # fmt: skip
