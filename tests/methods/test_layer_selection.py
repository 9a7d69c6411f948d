"""Which layers of a generator are trained."""

from __future__ import annotations

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.methods.clip_direction import ClipDirection
from mmforget.methods.layer_selection import ranked_groups, style_readers, trained_groups
from mmforget.models.base import state_hash
from mmforget.models.clip import load_clip
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN
from mmforget.testing.generator_conformance import tiny_gan


@pytest.fixture(scope="module")
def guide():
    return ConceptGuide(load_clip("digit_world"), [ConceptSpec("white")], {"white": ["pink"]})


@pytest.fixture(scope="module")
def style_based():
    torch.manual_seed(0)
    args = {"latent_size": 8, "style_size": 8, "channels": (8, 4, 4), "mapping_layers": 2}
    return ImageGAN("stylegan2", args)


def test_every_choice_names_groups():
    gan = tiny_gan()
    assert trained_groups(gan, "all") == ["first", "block.0", "block.1", "to_image"]
    assert trained_groups(gan, "no_to_image") == ["first", "block.0", "block.1"]
    assert trained_groups(gan, "block.1, first") == ["block.1", "first"]


def test_parts_of_a_style_based_generator_are_chosen_by_name(style_based):
    assert trained_groups(style_based, "mapping") == ["mapping"]
    assert "mapping" not in trained_groups(style_based, "synthesis")
    assert not any("to_image" in name for name in trained_groups(style_based, "no_to_image"))


def test_groups_read_the_styles_that_the_layout_gives_them(style_based):
    assert style_readers(style_based) == {
        "mapping": set(), "const": set(), "block.4": {0}, "to_image.4": {1}, "block.8": {1, 2},
        "to_image.8": {3}, "block.16": {3, 4}, "to_image.16": {5},
    }  # fmt: skip


def test_groups_of_a_plain_generator_rank_by_their_relative_gradient(guide):
    gan = tiny_gan()
    found = ranked_groups(gan, guide)
    latents = gan.draw(64, 0, purpose="-layers")
    best = guide.probabilities(gan.pictures(latents))[:, 0].argsort(descending=True)[:8]
    images = guide.embed(gan.synthesise(latents[best]))
    (images @ (guide.targets - guide.anchors).T).mean().backward()
    for group, names in gan.layer_groups().items():
        weights = [gan.network.get_parameter(name) for name in names]
        above = sum(float(w.grad.square().sum()) for w in weights)
        below = sum(float(w.detach().square().sum()) for w in weights)
        assert found[group] == pytest.approx(above / below, rel=1e-2)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_styles_rank_the_groups_that_read_them(style_based, guide):
    found = ranked_groups(style_based, guide)
    assert found["mapping"] == found["const"] == 0
    assert all(found[name] > 0 for name in found if name not in ("mapping", "const"))


@pytest.mark.parametrize("name", ["plain", "style_based"])
def test_ranking_leaves_the_model_as_it_was(name, style_based, guide):
    model = tiny_gan() if name == "plain" else style_based
    before = state_hash(model)
    ranked_groups(model, guide)
    assert state_hash(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_auto_takes_the_first_ones_in_forward_order(guide):
    gan = tiny_gan()
    best = list(ranked_groups(gan, guide))[:2]
    assert trained_groups(gan, "auto:2", guide) == [n for n in gan.layer_groups() if n in best]


def test_a_method_trains_the_best_groups_only(guide):
    gan = tiny_gan()
    few = {"pool": 64, "bearing": 0.5, "clear": 0.5, "train_layers": "auto:1"}
    method = ClipDirection(gan, ConceptSpec("white"), load_clip("digit_world"), ["pink"], **few)
    best = next(iter(ranked_groups(gan, guide)))
    trained = [name for name, p in method.model.network.named_parameters() if p.requires_grad]
    assert trained == gan.layer_groups()[best]


@pytest.mark.parametrize("choice", ["auto", "auto:0", "auto:5", "auto:x"])
def test_a_number_of_groups_that_makes_no_sense_is_refused(choice, guide):
    with pytest.raises(ConfigurationError, match="with a number k from 1 to 4"):
        trained_groups(tiny_gan(), choice, guide)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("mapping", "no mapping network"),
        ("block.7", "`train_layers` has 'block.7'"),
        (" , ", "name at least one group"),
        ("auto:1", "there is none"),
    ],
)
def test_other_bad_choices_are_refused(choice, message):
    with pytest.raises(ConfigurationError, match=message):
        trained_groups(tiny_gan(), choice)
