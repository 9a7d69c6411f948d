"""IdentityUnlearning and inversion: what is found, what is moved, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.erase import run_method
from mmforget.errors import ConfigurationError, RequestError
from mmforget.methods.identity_unlearning import IdentityUnlearning
from mmforget.models.base import Latents, state_hash
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN
from mmforget.models.latent_inversion import invert
from mmforget.testing.colour_world import ColourClip, colour_gan

RED = ConceptSpec("red")
OTHERS = ["green", "blue"]


class Styled(nn.Module):
    """A style-based generator in miniature."""

    latent_size, num_ws, style_size = 4, 2, 5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mapping = nn.Linear(4, 5)
        self.paint = nn.Linear(10, 3 * 16)

    def map_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.mapping(latents)

    def synthesise(self, styles: Tensor, noise: str = "constant") -> Tensor:
        return torch.tanh(self.paint(styles.flatten(1))).view(-1, 3, 4, 4)

    def mean_style(self) -> Tensor:
        return self.mapping.bias

    def forward(self, latents: Tensor) -> Tensor:
        return self.synthesise(self.map_latents(latents)[:, None].expand(-1, 2, -1))

    def layer_groups(self) -> dict[str, list[str]]:
        names = [name for name, _ in self.named_parameters()]
        return {
            "mapping": [name for name in names if "mapping" in name],
            "block": [name for name in names if "paint" in name],
        }


def reddest(model: ImageGAN) -> Latents:
    latents = model.draw(500, 5)
    images = model.pictures(latents)
    score = images[:, 0].mean((1, 2)) - images[:, 1:].amax(1).mean((1, 2))
    return latents[score.argmax()[None]]


def fast(model: ImageGAN, **settings) -> IdentityUnlearning:
    plain = {"pool": 128, "batch_size": 8, "retain_batch_size": 16, "lr": 5e-3}
    return IdentityUnlearning(model, RED, **(plain | settings))


# ---- inversion ----------------------------------------------------------------------------------


def test_a_drawn_picture_is_found_again_and_the_model_is_untouched():
    model = colour_gan()
    start = state_hash(model)
    images = model.generate(n=2, seed=9)
    latents, errors = invert(model, images, steps=80, starts=64)
    _, before = invert(model, images, steps=0, starts=64)
    assert (errors < 0.1 * before).all()
    torch.testing.assert_close(model.pictures(latents), images, atol=0.1, rtol=0)
    assert state_hash(model) == start
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inverted_latents_stay_where_latents_are():
    model = colour_gan()
    latents, _ = invert(model, torch.rand(3, 3, 8, 8), steps=60, lr=1.0, starts=64)
    drawn = model.draw(64, 0, purpose="-inversion").codes
    centre = drawn.mean(0)
    farthest = (drawn - centre).norm(dim=1).max()
    assert float((latents.codes - centre).norm(dim=1).max()) <= 1.0001 * float(farthest)


def test_inversion_in_styles():
    model = ImageGAN(Styled())
    images = model.generate(n=1, seed=2)
    latents, errors = invert(model, images, steps=150, starts=32, lr=0.2)
    assert latents.space == "w" and float(errors) < 2e-3


def test_inversion_of_a_conditional_generator_keeps_the_classes():
    model = colour_gan(classes=True)
    images = model.generate(["blue", "red"], 1)
    latents, errors = invert(model, images, torch.tensor([2, 0]), steps=30, starts=32)
    assert latents.labels.tolist() == [2, 0] and float(errors.max()) < 0.01
    with pytest.raises(ConfigurationError, match="3 classes"):
        invert(model, images)


@pytest.mark.parametrize(
    ("images", "settings", "match"),
    [
        (torch.rand(1, 3, 9, 8), {}, r"\(n, 3, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), {}, r"\(n, 3, 8, 8\)"),
        (torch.rand(1, 3, 8, 8), {"lr": 0.0}, "`lr`"),
    ],
)
def test_what_cannot_be_inverted_is_refused(images, settings, match):
    with pytest.raises(ConfigurationError, match=match):
        invert(colour_gan(), images, **settings)


# ---- the method ---------------------------------------------------------------------------------


def test_the_target_is_the_antipode_at_the_mean_distance():
    model = colour_gan()
    method = fast(model, latents=reddest(model))
    run_method(method, 1, progress=False)
    record = method.records["forget"][[0]]
    torch.testing.assert_close(record["codes"], reddest(model).codes)
    unit = record["codes"] / record["codes"].norm()
    torch.testing.assert_close(record["target"], -method.radius * unit)
    pool = method.pool().codes.norm(dim=1).mean()
    assert method.radius == pytest.approx(float(pool), rel=1e-5)


def test_a_given_latent_draws_something_else_and_the_rest_stays():
    model = colour_gan()
    source, start = reddest(model), state_hash(model)
    method = fast(model, latents=source, lr=2e-2)
    after = run_method(method, 100, progress=False)
    wanted = model.pictures(source.moved(-method.radius * source.codes / source.codes.norm()))
    before = model.pictures(source)
    moved = after.pictures(source)
    assert float((moved - wanted).abs().mean()) < 0.6 * float((before - wanted).abs().mean())
    others = model.draw(200, 77)
    drift = float((after.pictures(others) - model.pictures(others)).abs().mean())
    assert drift < 0.25 * float((moved - before).abs().mean())
    assert state_hash(method.restore()) == start


def test_a_picture_is_inverted_first():
    model = colour_gan()
    images = model.pictures(reddest(model))
    method = fast(model, images=images, inversion_steps=40)
    run_method(method, 1, progress=False)
    assert method.inversion_error[0] < 0.01
    assert method.statistics()["inversion_error"] == method.inversion_error


def test_a_text_takes_all_latents_that_show_it_and_no_target_shows_it():
    model = colour_gan()
    clip = [ColourClip()]
    method = fast(model, guide=clip, alternatives=OTHERS)
    run_method(method, 2, progress=False)
    guide = ConceptGuide(clip, [RED], {"red": OTHERS})
    every = method.records["forget"][list(range(len(method.records["forget"])))]
    seen = guide.probabilities(model.pictures(Latents(every["codes"])))
    aimed = guide.probabilities(model.pictures(Latents(every["target"])))
    assert float(seen.min()) > 0.3 and float(aimed.max()) <= 0.2
    assert 0.2 < method.prevalence["red"] < 0.6
    assert not method.no_op


def test_styles_are_moved_and_the_mapping_stays():
    model = ImageGAN(Styled())
    method = fast(model, latents=model.draw(1, 3))
    assert method.train_layers == "synthesis"
    after = run_method(method, 3, progress=False)
    assert method.records["forget"].latents.space == "w"
    assert torch.equal(after.network.mapping.weight, model.network.mapping.weight)
    assert not torch.equal(after.network.paint.weight, model.network.paint.weight)


def test_a_distance_of_the_users_own_is_used():
    model = colour_gan()
    calls = []

    def perceptual(images: Tensor, kept: Tensor) -> Tensor:
        calls.append(len(images))
        return (images - kept).abs().flatten(1).mean(1)

    run_method(fast(model, latents=reddest(model), perceptual=perceptual), 1, progress=False)
    assert calls == [8, 8, 16]


def test_same_seed_same_result():
    model = colour_gan()
    found = [run_method(fast(model, latents=reddest(model)), 3, progress=False) for _ in range(2)]
    assert state_hash(found[0]) == state_hash(found[1])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "neither"),
        ({"images": torch.rand(1, 3, 8, 8), "latents": Latents(torch.rand(1, 6))}, "both"),
        ({"latents": Latents(torch.rand(0, 6))}, "empty"),
        ({"latents": Latents(torch.rand(1, 6)), "distance": -1.0}, "`distance`"),
        ({"latents": Latents(torch.rand(1, 6)), "neighbourhood": -1.0}, "`neighbourhood`"),
    ],
)
def test_contradictory_settings_are_refused(settings, match):
    with pytest.raises(ConfigurationError, match=match):
        fast(colour_gan(), **settings)


def test_a_text_that_the_generator_does_not_draw_is_refused():
    model = colour_gan()
    with torch.no_grad():
        model.network.colour.weight[0] = -1.0
    with pytest.raises(RequestError, match="does not draw it"):
        run_method(fast(model, guide=[ColourClip()], alternatives=OTHERS), 1, progress=False)
