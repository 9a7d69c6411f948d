"""Adversarial fine-tuning: the pool of embeddings, what is learnt instead, resuming, effect."""

from __future__ import annotations

from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mmforget.attacks.report import Sampling
from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import planted_memories
from mmforget.erase import run_method
from mmforget.errors import ConfigurationError, DataError
from mmforget.methods.adversarial_fine_tuning import AdversarialFineTuning
from mmforget.metrics.copying import load_similarity, similarity_to_memories
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.embedding_search import EmbeddingSearch, search_embeddings
from mmforget.seeds import generator
from mmforget.testing.concept_conformance import ConceptMethodChecks, tiny_generator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

ORDINARY = ("a red cat", "a blue dog", "a house", "the street", "a horse", "a red car")
ATTACK = EmbeddingSearch(budgets=(2,), batch_size=1)
FAST = {
    "lr": 1e-3,
    "retain_batch_size": 3,
    "batch_size": 3,
    "attack": ATTACK,
    "slots": 2,
    "refresh_every": 2,
    "lifetime": 2,
    "draws": 3,
}


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


def made(model=None, **settings) -> AdversarialFineTuning:
    return AdversarialFineTuning(model or tiny_generator(), memories(), **(FAST | settings))


def fitted(method, steps=3, **settings):
    quiet_trainer(max_steps=steps, **settings).fit(method)
    return method


CHECKS = ConceptMethodChecks(
    lambda model, _: AdversarialFineTuning(model, memories(), **(FAST | {"refresh_every": 3})),
    steps=8,
)


@pytest.mark.parametrize("name", ["given_model", "resume", "divergence"])
def test_conformance(name):
    CHECKS.run(name)


@pytest.mark.slow
def test_processes():
    CHECKS.run("processes")


# ---- what is learnt instead ---------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_the_original_model_says_what_is_learnt_about_the_memorized_pictures(eta):
    model = tiny_generator()
    method = fitted(made(model, eta=eta), steps=2)
    records = method.records["memory"]
    assert len(records) == 2 * 3
    assert records.prompt.tolist() == [0, 1] * 3

    @torch.no_grad()
    def answer(text):
        return model.predict(records.noisy, records.time, model.encode([text] * len(records)))

    calls = {text: answer(text) for text in memories().texts}
    goals = [
        torch.stack([answer(text) - eta * (call - answer(text)) for text in ORDINARY])
        for call in calls.values()
    ]
    nearest = [(goal - records.target).flatten(2).abs().amax(2).min(0).values for goal in goals]
    # Both prompts call the first picture, only the second one calls the other.
    either = torch.stack(nearest).min(0).values
    assert float(torch.where(records.prompt == 0, either, nearest[1]).max()) < 1e-4
    # The inputs are the memorized pictures, under noise of their own.
    latents = model.to_latents(pictures(2))
    zero = torch.zeros_like(records.noisy)
    clean = model.noised(latents[records.prompt], zero, records.time)
    level = model.noised(zero, torch.ones_like(zero), records.time)
    noise = (records.noisy - clean) / level
    assert 0.8 < float(noise.std()) < 1.2
    assert len(records.time.unique()) > 3


def test_surrogates_are_learnt_with_the_truth_and_equally_often():
    model = tiny_generator()
    given = {"one": pictures(3, 5), "other": pictures(1, 6)}
    method = fitted(made(model, towards="surrogates", surrogates=given), steps=1)
    records = method.records["memory"]
    assert records.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    latents = torch.cat([given["one"], given["other"].expand(3, -1, -1, -1)])
    torch.testing.assert_close(records.latents, model.to_latents(latents), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="no pictures for 'other'"):
        made(towards="surrogates", surrogates={"one": pictures(1)})
    with pytest.raises(ConfigurationError, match="does not use them"):
        made(surrogates=given)


# ---- the pool -----------------------------------------------------------------------------------


def test_every_embedding_is_driven_on_until_it_starts_anew(monkeypatch):
    from mmforget.methods import adversarial_fine_tuning as module

    driven, original = [], module.search_embeddings

    def watched(model, images, **settings):
        driven.append(settings["start"].states.clone())
        return original(model, images, **settings)

    monkeypatch.setattr(module, "search_embeddings", watched)
    method = fitted(made(refresh_every=1, lifetime=2), steps=5)
    assert [len(states) for states in driven] == [4] * 5
    # Slot 0 lives for one drive at first, slot 1 for two; afterwards both live for two.
    assert method.pool.filled.tolist() == [3, 3]
    assert method.pool.age.tolist() == [2, 1]
    moved = [not torch.equal(a[:2], b[:2]) for a, b in pairwise(driven)]
    assert all(moved)
    assert len(method.finished) == 4
    assert not any(
        torch.equal(one.states, other.states)
        for row, one in enumerate(method.finished)
        for other in method.finished[:row]
    )


def test_starts_take_turns(monkeypatch):
    from mmforget.methods import adversarial_fine_tuning as module

    seen, original = [], module.starting_embeddings

    def watched(model, images, settings, *rest):
        seen.append(settings.init)
        return original(model, images, settings, *rest)

    monkeypatch.setattr(module, "starting_embeddings", watched)
    fitted(made(inits=("random", "trigger", "ordinary"), refresh_every=1, lifetime=1), steps=3)
    assert seen == ["random", "trigger", "trigger", "ordinary", "ordinary", "random"]


def test_the_attack_lowers_the_error_on_the_memorized_pictures():
    """On a model that hardly moves, embeddings of the pool fit better than where they began."""
    model = tiny_generator()
    attack = EmbeddingSearch(budgets=(30,), batch_size=4)
    method = fitted(made(model, lr=1e-12, attack=attack, inits=("random",), lifetime=9), steps=1)
    latents = model.to_latents(pictures(2))
    draw = generator(0, "test-noise")
    rows = torch.arange(2).repeat_interleave(64)
    noise = torch.randn(len(rows), *model.latent_shape, generator=draw)
    time = model.draw_times(len(rows), draw)
    errors = []
    for embedding in (
        method._start(attack, 0, 0),
        method.pool.rows(torch.zeros(2, dtype=torch.long), torch.arange(2)),
    ):
        with torch.no_grad():
            noisy = model.noised(latents[rows], noise, time)
            found = model.predict(noisy, time, embedding[rows])
        errors.append(float((found - model.target(latents[rows], noise, time)).square().mean()))
    assert errors[1] < 0.99 * errors[0]


def test_triggers_pool_and_finished_embeddings_have_their_shares():
    method = fitted(made(refresh_every=1, trigger_share=0.3, replay_share=0.25), steps=4)
    count = 600
    batch = {"prompt": torch.arange(count) % 2, "id": torch.arange(count)}
    found = method.memory_embedding(batch).states
    triggers = method.table.states[1:3]
    pool = method.pool.states.transpose(0, 1)
    kinds = {"trigger": 0, "pool": 0, "finished": 0}
    for row, states in enumerate(found):
        number = row % 2
        own = [triggers[0], triggers[1]] if number == 0 else [triggers[1]]
        if any(torch.equal(states, one) for one in own):
            kinds["trigger"] += 1
        elif any(torch.equal(states, one) for one in pool[number]):
            kinds["pool"] += 1
        else:
            assert any(torch.equal(states, one.states[number]) for one in method.finished)
            kinds["finished"] += 1
    assert kinds["trigger"] / count == pytest.approx(0.3, abs=0.06)
    assert kinds["finished"] / count == pytest.approx(0.7 * 0.25, abs=0.06)


def test_without_attack_only_the_prompts_are_retrained():
    method = fitted(made(attack=None))
    assert method.pool is None
    batch = {"prompt": torch.tensor([1, 1]), "id": torch.tensor([0, 1])}
    found = method.memory_embedding(batch).states
    assert torch.equal(found, method.table.states[[2, 2]])
    taught = 2 * (2 * 3)  # two predictions for three draws of two pictures
    assert method.cost()["forget_sample_passes"] == taught + 3 * 3 * 3
    attacked = fitted(made()).cost()["forget_sample_passes"]
    # Two drives of two slots, two pictures, two steps, forward and backward.
    assert attacked == taught + 3 * 3 * 3 + 3 * (2 * 2 * 2 * 2)


def test_the_weight_scales_the_adversarial_error():
    method = fitted(made(), steps=1)
    batch = {name: part[[0, 1]] for name, part in method.records.items()}
    one = method.losses(batch)
    method.weight = 3.0
    other = method.losses(batch)
    torch.testing.assert_close(other["memory"], 3 * one["memory"])
    torch.testing.assert_close(other["retain"], one["retain"])


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_families_with_pooled_embeddings(kind):
    model = DiffusionGenerator(tiny_pipeline(kind), steps=2)
    method = fitted(made(model), steps=3)
    assert method.pool.pooled.shape[:2] == (2, 2)
    method.finalize()
    assert not method.no_op


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"towards": "surogates"}, "did you mean 'surrogates'"),
        ({"eta": -1.0}, "`eta` is -1.0"),
        ({"slots": 0}, "`slots` is 0"),
        ({"refresh_every": 0}, "`refresh_every` is 0"),
        ({"lifetime": 0}, "`lifetime` is 0"),
        ({"replay": -1}, "`replay` is -1"),
        ({"replay_share": 1.5}, "`replay_share` is 1.5"),
        ({"trigger_share": -0.1}, "`trigger_share` is -0.1"),
        ({"weight": 0.0}, "`weight` is 0.0"),
        ({"draws": 0}, "`draws` is 0"),
        ({"inits": ()}, "`inits` is empty"),
        ({"inits": ("triger",)}, "did you mean 'trigger'"),
        ({"attack": EmbeddingSearch(budgets=(0,))}, "would do nothing"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        made(**settings)


def test_a_prompt_without_a_picture_cannot_be_attacked():
    bare = MemorizedSet(
        (*memories().prompts, MemorizedPrompt("a banana")),
        memories().images,
        retain=memories().retain,
    )
    with pytest.raises(DataError, match="'a banana' has no picture"):
        AdversarialFineTuning(tiny_generator(), bare, **FAST)


# ---- effect -------------------------------------------------------------------------------------


def replicated(model, memorized, embedding=None) -> torch.Tensor:
    """(P, 2) similarity of pictures to the memorized ones, by prompt or by embedding."""
    prompts = memorized.texts
    if embedding is None:
        images = model.generate(prompts, n=2, seed=900)
    else:
        keys = [(prompt, number) for prompt in prompts for number in range(2)]
        images = Sampling(seed=901, steps=model.steps).pictures(
            model, keys, embedding[torch.arange(len(prompts)).repeat_interleave(2)]
        )
    return similarity_to_memories(load_similarity("ncc"), images, memorized, 2)


def attacked(model, memorized, init, steps=50, batch_size=4) -> torch.Tensor:
    images = torch.stack([memorized.images[one.images[0]] for one in memorized])
    settings = EmbeddingSearch(budgets=(steps,), batch_size=batch_size, init=init, seed=902)
    found = search_embeddings(model, images, settings=settings, triggers=memorized.texts)
    return replicated(model, memorized, found[steps])


def shipped() -> DiffusionGenerator:
    folder = resources.files("mmforget") / "assets" / "digit_world" / "memorizing_unet"
    return load_generator(Path(str(folder)), steps=10, guidance=3.0)


def test_two_memories_go_and_no_embedding_brings_them_back():
    model, few = shipped(), planted_memories(retain=128, test=2).only([0, 1])
    assert replicated(model, few).min() > 0.9
    method = AdversarialFineTuning(
        model,
        few,
        lr=5e-4,
        batch_size=8,
        retain_batch_size=8,
        slots=2,
        draws=64,
        refresh_every=10,
        check_every=50,
    )
    result = run_method(method, 50, progress=False)
    assert replicated(result, few).max() < 0.6
    assert attacked(result, few, "random", steps=25).max() < 0.6
    before, after = method.statistics()["held_out_error"]
    assert after < 1.05 * before


@pytest.mark.slow
def test_all_planted_memories_survive_neither_prompts_nor_attacks():
    """What an attack on surrogate fine-tuning alone brings back stays away after ours."""
    model, memorized = shipped(), planted_memories()
    settings = {"lr": 5e-4, "batch_size": 24, "retain_batch_size": 16}
    plain = AdversarialFineTuning(model, memorized, "surrogates", attack=None, **settings)
    reopened = attacked(run_method(plain, 240, progress=False), memorized, "random")
    assert (reopened.max(1).values > 0.8).double().mean() >= 0.5
    method = AdversarialFineTuning(model, memorized, **settings)
    result = run_method(method, 360, progress=False)
    assert method.statistics()["stopped_at"] is None
    assert (replicated(result, memorized).max(1).values > 0.75).double().mean() <= 0.15
    for init in ("random", "trigger"):
        found = attacked(result, memorized, init, steps=100)
        assert (found.max(1).values > 0.75).double().mean() <= 0.15
