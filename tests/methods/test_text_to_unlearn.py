"""Text-to-Unlearn and the frame of the generator methods, on the shipped generator."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget import ConceptSpec, ImageGAN, TextToUnlearn, load_clip, load_gan, load_judge
from mmforget.data.digit_world import DIGITS, INKS
from mmforget.erase import run_method
from mmforget.errors import ConfigurationError, ModelError, RequestError
from mmforget.methods import generator_editing
from mmforget.methods.generator_retention import embedding_distance, pixel_distance
from mmforget.models.base import state_hash
from mmforget.models.clip import ClipModel

OTHERS = [digit for digit in DIGITS if digit != "seven"]
OTHER_INKS = [ink for ink in INKS if ink != "red"]
TINY = {"latent_size": 8, "channels": (16, 8, 8, 8)}


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return load_clip("digit_world")


@pytest.fixture(scope="module")
def gan() -> ImageGAN:
    return load_gan("gan")


def method_for(gan: ImageGAN, clip: ClipModel, **settings: Any) -> TextToUnlearn:
    chosen = {"alternatives": OTHERS, "pool": 1024, "mapper_steps": 0} | settings
    return TextToUnlearn(gan, ConceptSpec("seven"), clip, **chosen)


@pytest.fixture(scope="module")
def unlearned(gan: ImageGAN, clip: ClipModel) -> ImageGAN:
    method = TextToUnlearn(
        gan, ConceptSpec("red"), clip, OTHER_INKS, batch_size=16, retain_batch_size=32, pool=1024,
        mapper_steps=0,
    )  # fmt: skip
    return run_method(method, 60, progress=False)  # type: ignore[return-value]


def seen(model: ImageGAN, factor: str = "digit") -> Tensor:
    judge = load_judge()
    return judge(model.pictures(model.draw(1000, 9, purpose="-test")))[factor].argmax(1)


def test_it_forgets_and_retains_by_a_judge_that_did_not_guide(
    gan: ImageGAN, unlearned: ImageGAN
) -> None:
    before, after = seen(gan, "ink"), seen(unlearned, "ink")
    assert int((before == 0).sum()) > 100
    assert int((after == 0).sum()) < 0.1 * int((before == 0).sum())
    kept = before != 0
    assert float((before[kept] == after[kept]).double().mean()) > 0.9
    digits = seen(gan)[kept] == seen(unlearned)[kept]
    assert float(digits.double().mean()) > 0.7


def test_the_given_generator_is_left_as_it_was(gan: ImageGAN, clip: ClipModel) -> None:
    before = state_hash(gan)
    method = method_for(gan, clip)
    unlearned = run_method(method, 3, progress=False)
    assert state_hash(gan) == before == state_hash(method.restore())
    assert state_hash(unlearned) != before
    assert all(parameter.requires_grad for parameter in unlearned.parameters())


def test_statistics_of_normalisations_are_those_of_the_original(
    gan: ImageGAN, unlearned: ImageGAN
) -> None:
    for name, value in gan.network.named_buffers():
        assert torch.equal(value, unlearned.network.get_buffer(name)), name


def test_the_pool_is_sorted_by_the_guide(gan: ImageGAN, clip: ClipModel) -> None:
    method = method_for(gan, clip, bearing=0.4, clear=0.1)
    run_method(method, 1, progress=False)
    assert float(method.records["forget"].extra["probability"].min()) > 0.4
    assert float(method.records["retain"].extra["probability"].max()) < 0.1
    latents = method.records["forget"].latents[:8]
    found = method.guide.probabilities(gan.synthesise(latents))
    assert torch.allclose(found, method.records["forget"].extra["probability"][:8], atol=1e-4)
    assert 0.02 < method.prevalence["seven"] < 0.3


def test_the_loss_is_that_of_the_formula(gan: ImageGAN, clip: ClipModel) -> None:
    method = method_for(gan, clip, batch_size=4, retain_batch_size=6, kappa=3.0)
    run_method(method, 1, progress=False)
    batch = {name: records[list(range(4))] for name, records in method.records.items()}
    terms = method.losses(batch)
    bearing, clear = (method.drawn(batch[name]) for name in ("forget", "retain"))
    margins = method.guide.margins(method.guide.embed(method.model.synthesise(bearing)))[:, 0]
    assert terms["forget"].item() == pytest.approx(
        0.2 * torch.relu(margins + 3).mean().item(), rel=1e-4
    )
    moved = method.model.synthesise(clear) - gan.synthesise(clear)
    assert terms["retain"].item() == pytest.approx(20 * 4 * moved.square().mean().item(), rel=1e-3)
    assert sorted(terms) == ["forget", "retain"]


def test_edits_are_pushed_back_to_the_unedited_picture(gan: ImageGAN, clip: ClipModel) -> None:
    method = method_for(
        gan, clip, mapper_steps=5, mapper_tries=1, batch_size=4, retain_batch_size=4
    )
    run_method(method, 1, progress=False)
    batch = {name: records[list(range(4))] for name, records in method.records.items()}
    terms = method.losses(batch)
    assert sorted(terms) == ["edit", "edit_retain", "forget", "retain"]
    report = method.statistics()["mappers"][0]
    assert report["tries"] == 1 and report["steps"] == 5


def test_every_training_of_a_mapper_is_paid_for(
    gan: ImageGAN, clip: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = functools.partial(generator_editing.train_mapper, checked=8, enough=1.1)
    monkeypatch.setattr(generator_editing, "train_mapper", quick)
    method = method_for(gan, clip)
    method.train_mappers(steps=2, tries=3, scale=1e-9)  # no later one is better than the first
    assert method.cost()["forget_sample_passes"] == 3 * 3 * 2 * 64  # a backward pass counts twice
    assert method.statistics()["mappers"][0]["tries"] == 3


@pytest.mark.slow
def test_several_concepts_are_erased_at_once(gan: ImageGAN, clip: ClipModel) -> None:
    concepts = [ConceptSpec("seven"), ConceptSpec("red")]
    alternatives = {"seven": OTHERS, "red": OTHER_INKS}
    method = TextToUnlearn(
        gan, concepts, clip, alternatives, pool=1024, mapper_steps=0, retain_batch_size=32
    )
    unlearned: Any = run_method(method, 50, progress=False)
    assert set(method.prevalence) == {"seven", "red"}
    for factor, place in (("digit", 7), ("ink", 0)):
        before, after = (int((seen(one, factor) == place).sum()) for one in (gan, unlearned))
        assert after < 0.6 * before, factor


@pytest.mark.slow
def test_the_published_objective_blocks_the_edit_and_leaves_the_concept(
    gan: ImageGAN, clip: ClipModel
) -> None:
    method = method_for(
        gan, clip, objective="direction", mapper_steps=60, mapper_tries=1, batch_size=16,
        retain_batch_size=16,
    )  # fmt: skip
    unlearned: Any = run_method(method, 50, progress=False)
    latents = gan.draw(200, 9, purpose="-test")
    edited = method._mappers[0](latents)
    rates = [
        float((method.guide.probabilities(one.pictures(edited))[:, 0] > 0.5).double().mean())
        for one in (gan, unlearned)
    ]
    assert rates[0] > 0.6 and rates[1] < 0.5 * rates[0]
    before, after = (int((seen(one) == 7).sum()) for one in (gan, unlearned))
    assert after > 0.5 * before


def test_only_the_chosen_layers_change(gan: ImageGAN, clip: ClipModel) -> None:
    method = method_for(gan, clip, train_layers="block.1,to_image")
    unlearned: Any = run_method(method, 3, progress=False)
    changed = {
        name.partition(".")[0] + "." + name.split(".")[1]
        for name, value in gan.network.named_parameters()
        if not torch.equal(value, unlearned.network.get_parameter(name))
    }
    assert changed == {"ups.1", "norms.2", "to_image.weight", "to_image.bias"}


def test_distances_of_what_must_stay(gan: ImageGAN, clip: ClipModel) -> None:
    images, kept = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    expected = ((2 * images - 2 * kept) ** 2).mean((1, 2, 3))
    assert torch.allclose(pixel_distance(images, kept), expected)
    guide = method_for(gan, clip).guide
    change = guide.embed(images) - guide.embed(kept)
    direction = guide.directions()[0]
    without = change - (change @ direction)[:, None] * direction
    assert torch.allclose(
        embedding_distance(guide)(images, kept), without.square().sum(1), atol=1e-5
    )


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "cosine"}, "objective"),
        ({"bearing": 0.1, "clear": 0.5}, "clear"),
        ({"retain": "lpips"}, "retain"),
        ({"retain_weight": -1.0}, "retain_weight"),
        ({"train_layers": "mapping"}, "mapping network"),
        ({"train_layers": "block.7"}, r"block\.7"),
        ({"mapper_steps": -1}, "mapper_steps"),
        ({"objective": "direction", "mapper_steps": 0}, "mapper_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"alternatives": {"seven": "one"}}, "list of texts"),
    ],
)
def test_settings_out_of_range_are_refused(
    gan: ImageGAN, clip: ClipModel, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        method_for(gan, clip, **settings)


def test_a_concept_that_is_not_drawn_is_refused(clip: ClipModel) -> None:
    grey = ImageGAN("dcgan", network_args=dict(TINY)).fresh(0).eval()
    with torch.no_grad():
        grey.network.to_image.weight.mul_(30)
    with pytest.raises(RequestError, match=r"does not draw it|nothing to keep"):
        run_method(method_for(grey, clip), 1, progress=False)


def test_a_concept_that_is_everything_is_refused(gan: ImageGAN, clip: ClipModel) -> None:
    method = TextToUnlearn(
        gan, ConceptSpec("digit"), clip, alternatives=["cat"], pool=256, mapper_steps=0
    )
    with pytest.raises(RequestError, match=r"nothing to keep|too few to keep"):
        run_method(method, 1, progress=False)


def test_a_guide_that_sees_enlarged_pictures_is_warned_of(
    gan: ImageGAN, clip: ClipModel, caplog: pytest.LogCaptureFixture
) -> None:
    method_for(gan, clip)
    assert "enlarged" not in caplog.text
    large = copy.deepcopy(clip)
    large.preprocess["size"] = 224
    method_for(gan, large)
    assert "pictures of 32 pixels, which the guide sees enlarged to 224" in caplog.text


def test_a_collapsed_generator_is_refused(clip: ClipModel) -> None:
    collapsed = ImageGAN("dcgan", network_args=dict(TINY)).fresh(0).eval()
    with torch.no_grad():
        collapsed.network.to_image.weight.zero_()
    with pytest.raises(ModelError, match="collapsed"):
        run_method(method_for(collapsed, clip), 1, progress=False)


def test_words_that_the_guide_cannot_tell_apart_are_refused(gan: ImageGAN, clip: ClipModel) -> None:
    with pytest.raises(RequestError, match="similarity"):
        method_for(gan, clip, alternatives=["SEVEN"])
