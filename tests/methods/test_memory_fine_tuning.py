"""The frame of repairs by fine-tuning: fresh noise, captions, the early end, and resuming."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path

import pytest
import torch

from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import planted_memories
from mmforget.erase import run_method
from mmforget.errors import ConfigurationError, DataError, ModelError, RequestError
from mmforget.methods.memory_fine_tuning import EMPTY, EndlessStream, NoisedPictures
from mmforget.methods.retain_fine_tuning import RetainFineTuning
from mmforget.metrics.copying import load_similarity, similarity_to_memories
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.seeds import generator
from mmforget.testing.concept_conformance import ConceptMethodChecks, tiny_generator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

FAST = {"lr": 1e-3, "retain_batch_size": 3}
ORDINARY = ("a red cat", "a blue dog", "a house", "the street", "a horse", "a red car")


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=generator(seed, "test-pictures"))


def memories(retain_images: bool = True) -> MemorizedSet:
    one, other = pictures(2)
    captioned = Captioned(ORDINARY, pictures(len(ORDINARY), 1) if retain_images else None)
    return MemorizedSet(
        (
            MemorizedPrompt("a van gogh house", ("one",), "verbatim"),
            MemorizedPrompt("monet in the street", ("one", "other"), "template"),
        ),
        {"one": one, "other": other},
        retain=captioned,
    )


@pytest.fixture
def model() -> DiffusionGenerator:
    return tiny_generator()


def fitted(method, steps=3, **settings):
    quiet_trainer(max_steps=steps, **settings).fit(method)
    return method


CHECKS = ConceptMethodChecks(
    lambda model, _: RetainFineTuning(model, memories(), check_every=2, **FAST), steps=6
)


@pytest.mark.parametrize("name", sorted(set(ConceptMethodChecks.names()) - {"effect", "access"}))
def test_conformance(name):
    CHECKS.run(name)


def test_the_settings_are_checked_before_any_work(model):
    for settings, message in (
        ({"retain_batch_size": 0}, "`retain_batch_size` is 0"),
        ({"check_every": 0}, "`check_every` is 0"),
        ({"caption_dropout": 1.0}, "`caption_dropout` is 1.0"),
        ({"tolerance": 0.0}, "`tolerance` is 0.0"),
        ({"clip": 0.0}, "`clip` is 0.0"),
        ({"lr": -1.0}, "`lr` is -1.0"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            RetainFineTuning(model, memories(), **(FAST | settings))


def test_the_memories_are_checked_before_any_work(model):
    prompts = (MemorizedPrompt("a van gogh house"),)
    with pytest.raises(DataError, match=r"`memorized\.retain` has 0 captions"):
        RetainFineTuning(model, MemorizedSet(prompts), **FAST)
    long = Captioned(("a cat", "cat " * 40))
    with pytest.raises(RequestError, match="tokens"):
        RetainFineTuning(model, MemorizedSet(prompts, retain=long), **FAST)
    model.network.half()
    with pytest.raises(ModelError, match="single precision"):
        RetainFineTuning(model, memories(), **FAST)


def test_pictures_of_another_size_are_refused(model):
    small = Captioned(ORDINARY, torch.rand(len(ORDINARY), 3, 8, 8))
    wrong = MemorizedSet((MemorizedPrompt("a van gogh house"),), retain=small)
    with pytest.raises(DataError, match="resize"):
        fitted(RetainFineTuning(model, wrong, **FAST))


def noised(model, dropout=0.0, seed=0) -> NoisedPictures:
    latents = torch.randn(5, *model.latent_shape, generator=generator(0, "test-latents"))
    return NoisedPictures(model, latents, torch.arange(1, 6), seed, "test", dropout)


def test_every_record_is_its_picture_under_a_draw_of_its_own(model):
    records = noised(model)
    batch = records[[1, 6, 1, ~11]]
    noise = batch["target"]  # of a model that predicts noise
    clean = records.noisy[1]
    for row in range(4):
        mixed = model.noised(clean[None], noise[row : row + 1], batch["time"][row : row + 1])
        torch.testing.assert_close(batch["noisy"][row], mixed[0])
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert batch["prompt"].tolist() == [2, 2, 2, 2]
    assert batch["weight"].tolist() == [1, 1, 1, 0]
    other = noised(model, seed=1)[[1]]
    assert not torch.equal(other["target"][0], noise[0])


def test_captions_are_dropped_in_their_share(model):
    prompts = noised(model, dropout=0.25)[list(range(2000))]["prompt"]
    assert 0.2 < float((prompts == EMPTY).float().mean()) < 0.3
    assert (noised(model)[list(range(200))]["prompt"] != EMPTY).all()


def test_a_stream_never_shows_the_same_noise_twice_and_all_pictures_equally_often(model):
    stream = EndlessStream({"retain": noised(model)}, {"retain": 3}, seed=0)
    found = torch.cat([stream.positions("retain", step) for step in range(10)])
    assert len(found.unique()) == 30
    assert (found % 5).bincount().tolist() == [6] * 5


def test_half_of_the_batches_say_the_same_from_the_middle_on(model):
    """What a step sees depends on its number only, so that a run can go on anywhere."""
    whole = list(EndlessStream({"retain": noised(model)}, {"retain": 2}, seed=0))
    later = next(iter(EndlessStream({"retain": noised(model)}, {"retain": 2}, seed=0, first=2)))
    for key, value in whole[2]["retain"].items():
        assert torch.equal(value, later["retain"][key])


def test_the_loss_is_the_denoising_error_of_the_ordinary_pictures(model):
    method = fitted(RetainFineTuning(model, memories(), **FAST), steps=2)
    batch = {"retain": method.records["retain"][[0, 3, 8]]}
    part = batch["retain"]
    texts = [None, *memories().texts, *ORDINARY]
    embedding = model.encode([texts[row] or "" for row in part["prompt"].tolist()])
    found = method.model.predict(part["noisy"], part["time"], embedding)
    wanted = (found - part["target"]).square().mean()
    torch.testing.assert_close(method.losses(batch)["retain"], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd35", "flux"])
def test_all_families_train(kind):
    model = DiffusionGenerator(tiny_pipeline(kind), steps=2)
    method = fitted(RetainFineTuning(model, memories(), **FAST), steps=2)
    result = method.finalize()
    assert not method.no_op
    assert state_hash(result.text_encoders) == state_hash(model.text_encoders)
    assert state_hash(result.vae) == state_hash(model.vae)


def test_guidance_trains_what_the_family_leads_away_from():
    model = DiffusionGenerator(tiny_pipeline("sdxl"), steps=2)
    method = fitted(RetainFineTuning(model, memories(), **FAST), steps=1)
    assert torch.equal(method.table.states[EMPTY], model.unconditional().states[0])


def test_without_pictures_the_frozen_model_draws_them(model):
    method = fitted(RetainFineTuning(model, memories(retain_images=False), tolerance=None, **FAST))
    drawn = model.generate(ORDINARY, n=1, seed=0)
    torch.testing.assert_close(
        model.to_images(method.records["retain"].noisy).clamp(0, 1), drawn, rtol=1e-3, atol=1e-3
    )
    spent = method.cost()["retain_sample_passes"]
    assert spent == len(ORDINARY) * 2 * model.steps + 3 * 3 * 3


def test_held_out_pictures_are_not_trained_on(model):
    method = fitted(RetainFineTuning(model, memories(), **FAST))
    kept, held = method.records["retain"].noisy, method.held_out.noisy
    assert (len(kept), len(held)) == (5, 1)
    assert not any(torch.equal(held[0], one) for one in kept)
    everything = fitted(RetainFineTuning(model, memories(), tolerance=None, **FAST))
    assert len(everything.records["retain"].noisy) == 6


def test_a_run_that_damages_the_model_ends_early(model, caplog):
    def loop(**settings):
        method = RetainFineTuning(
            model, memories(), lr=0.3, clip=1e3, check_every=2, retain_batch_size=3, **settings
        )
        with caplog.at_level(logging.WARNING):
            return fitted(method, steps=8)

    caplog.clear()
    method = loop()
    assert method.global_step == 2
    assert "held-out pictures rose" in caplog.text
    before, after = method.statistics()["held_out_error"]
    assert after > 1.05 * before
    assert method.statistics()["stopped_at"] == 2
    free = loop(tolerance=None)
    assert free.global_step == 8
    assert free.statistics()["held_out_error"] == [None, None]


def test_the_held_out_error_is_always_on_the_same_draws(model):
    method = fitted(RetainFineTuning(model, memories(), check_every=2, **(FAST | {"lr": 1e-12})))
    before, after = method.statistics()["held_out_error"]
    assert after == pytest.approx(before, rel=1e-5)


def test_the_edit_leads_from_the_original_to_the_result(model):
    method = fitted(RetainFineTuning(model, memories(), **FAST))
    result = method.finalize()
    edit = method.weight_edit()
    assert edit.metadata["method"] == "RetainFineTuning"
    assert edit.metadata["memorized_prompts"] == 2
    edit.apply(model)
    assert state_hash(model) == state_hash(result)


def test_half_precision_elsewhere_trains_in_single_precision(model, monkeypatch):
    monkeypatch.setattr(DiffusionGenerator, "require_full_precision", lambda *_: None)
    model.network.to(torch.bfloat16)
    method = RetainFineTuning(model, memories(), **(FAST | {"lr": 1e-2}))
    assert {p.dtype for p in method.model.network.parameters()} == {torch.float32}
    result = fitted(method).finalize()
    assert {p.dtype for p in result.network.parameters()} == {torch.bfloat16}
    assert not method.no_op


def test_ordinary_pictures_alone_leave_the_memories_where_they_are():
    """Shows that a measurement of forgetting has power: here nothing may seem forgotten."""
    folder = resources.files("mmforget") / "assets" / "digit_world" / "memorizing_unet"
    memorized = planted_memories(retain=64, test=2).only([0, 1, 8])
    shipped = load_generator(Path(str(folder)), steps=8, guidance=3.0)
    method = RetainFineTuning(shipped, memorized, lr=5e-4, retain_batch_size=8, tolerance=None)
    images = run_method(method, 40, progress=False).generate(memorized.texts, n=2, seed=900)
    found = similarity_to_memories(load_similarity("ncc"), images, memorized, 2)
    assert found.min() > 0.9
    assert not method.no_op
