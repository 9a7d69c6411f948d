import copy
import json
from dataclasses import replace
from importlib import resources

import pytest
import torch

from mmforget.attacks.embedding_inversion import embedding_attack
from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import TEMPLATE_TITLES, TITLES, planted_memories
from mmforget.errors import ConfigurationError, DataError, ModelError
from mmforget.metrics.copying import load_similarity, similarity_to_memories
from mmforget.models.base import PromptEmbedding, state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.embedding_search import (
    EmbeddingSearch,
    embedding_scale,
    row_keys,
    search_embeddings,
    starting_embeddings,
)
from mmforget.seeds import generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

ASSETS = resources.files("mmforget") / "assets" / "digit_world"
QUICK = EmbeddingSearch(budgets=(0, 2), batch_size=2)
PROMPTS = ["a red cat", "the blue dog"]


def pictures(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny():
    return DiffusionGenerator(tiny_pipeline("sd"), steps=2)


# ---- the search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("pooled", [False, True])
def test_every_family_is_searched_and_left_as_it_was(kind, pooled):
    model = DiffusionGenerator(tiny_pipeline(kind)).train()
    before, hooks = state_hash(model), len(model.network._forward_hooks)
    settings = replace(QUICK, pooled=pooled, init="trigger")
    found = search_embeddings(model, pictures(2), settings=settings, triggers=PROMPTS)
    assert list(found) == [0, 2]
    own = model.encode(PROMPTS)
    assert torch.equal(found[0].states, own.states.detach())
    moved = (found[2].states != found[0].states).flatten(1).any(1)
    assert moved.all() and found[2].states.isfinite().all()
    if own.pooled is None:
        assert found[2].pooled is None
    else:
        assert torch.equal(found[2].pooled, own.pooled.detach()) is not pooled
    assert state_hash(model) == before and len(model.network._forward_hooks) == hooks
    assert model.network.training and not found[2].states.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.network.parameters())


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
def test_the_search_is_adam_on_the_denoising_loss_of_each_picture_alone(kind):
    model, images = DiffusionGenerator(tiny_pipeline(kind)), pictures(2)
    settings = EmbeddingSearch(budgets=(3,), batch_size=3, init="trigger", seed=5)
    found = search_embeddings(model, images, settings=settings, triggers=PROMPTS)[3]
    scale = embedding_scale(model, PROMPTS).states
    latents, start = model.to_latents(images), model.encode(PROMPTS)
    for row, key in enumerate(row_keys(images)):
        y = start.states[row].detach().clone().requires_grad_()
        draw = generator(5, "embedding-search", key)
        rows = [torch.optim.Adam([y], lr=0.1 * float(scale[0]))]
        assert scale.unique().numel() == 1 or kind == "sd3"
        first, second = torch.zeros_like(y), torch.zeros_like(y)
        for step in range(1, 4):
            noise = torch.randn((3, *model.latent_shape), generator=draw)
            time = model.draw_times(3, draw)
            clean = latents[row].expand(3, -1, -1, -1)
            pooled = None if start.pooled is None else start.pooled[row].expand(3, -1)
            out = model.predict(
                model.noised(clean, noise, time),
                time,
                PromptEmbedding(y.expand(3, -1, -1), pooled),
            )
            loss = (out - model.target(clean, noise, time)).square().mean()
            (slope,) = torch.autograd.grad(loss, y)
            if kind != "sd3":
                y.grad = slope
                rows[0].step()
                continue
            # two encoders of different sizes: Adam by hand, with one rate per position
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            change = (first / (1 - 0.9**step)) / (second / (1 - 0.999**step)).sqrt()
            change = change.nan_to_num()
            y = (y.detach() - 0.1 * scale[:, None] * change).requires_grad_()
        # Adam adds 1e-8 to tiny gradients, which are larger in the sum that the search takes.
        near = (found.states[row] - y).abs() < 0.02 * scale.max()
        assert near.float().mean() > 0.97
        assert (y - start.states[row]).abs().max() > 0.1 * scale.max()


def test_a_picture_does_not_depend_on_its_neighbours_or_on_the_size_of_passes(tiny):
    images = pictures(3)
    all_rows = search_embeddings(tiny, images, settings=QUICK)[2].states
    alone = search_embeddings(tiny, images[2:], settings=QUICK)[2].states
    small = search_embeddings(tiny, images, settings=replace(QUICK, max_rows=1))[2].states
    turned = search_embeddings(tiny, images.flip(0), settings=QUICK)[2].states.flip(0)
    for other in (small, turned):
        torch.testing.assert_close(other, all_rows, atol=2e-3, rtol=0)
    torch.testing.assert_close(alone[0], all_rows[2], atol=2e-3, rtol=0)
    assert (all_rows[0] - all_rows[1]).abs().max() > 0.1


def test_a_longer_search_begins_with_all_of_a_shorter_one(tiny):
    short = search_embeddings(tiny, pictures(1), settings=replace(QUICK, budgets=(1, 3)))
    long = search_embeddings(tiny, pictures(1), settings=replace(QUICK, budgets=(3, 0, 1, 4, 3)))
    assert list(long) == [0, 1, 3, 4]
    for budget in (1, 3):
        assert torch.equal(short[budget].states, long[budget].states)
    other = search_embeddings(tiny, pictures(1), settings=replace(QUICK, budgets=(1,), seed=1))
    assert not torch.equal(other[1].states, long[1].states)


def test_equal_pictures_get_searches_of_their_own(tiny):
    twice = pictures(1).repeat(2, 1, 1, 1)
    found = search_embeddings(tiny, twice, settings=QUICK)
    assert not torch.equal(found[0].states[0], found[0].states[1])
    assert len(set(row_keys(twice))) == 2


def test_the_loss_falls(tiny):
    images = pictures(2)
    settings = EmbeddingSearch(budgets=(0, 20), batch_size=4)
    found = search_embeddings(tiny, images, settings=settings)
    latents, draw = tiny.to_latents(images).repeat(32, 1, 1, 1), torch.Generator().manual_seed(0)
    noise, time = torch.randn(latents.shape, generator=draw), tiny.draw_times(64, draw)
    losses = []
    for embedding in found.values():
        with torch.no_grad():
            every = torch.arange(2).repeat(32)
            out = tiny.predict(tiny.noised(latents, noise, time), time, embedding[every])
        losses.append(float((out - noise).square().mean()))
    assert losses[1] < losses[0]


def test_special_positions_stay_if_asked(tiny):
    settings = replace(QUICK, tokens="non_special", init="trigger")
    found = search_embeddings(tiny, pictures(2), settings=settings, triggers=PROMPTS)
    moved = (found[2].states != found[0].states).any(2)
    content = tiny.segments(PROMPTS)[0].content
    assert torch.equal(moved, content) and 0 < content.sum() < content.numel()
    _, free = starting_embeddings(tiny, pictures(2), replace(settings, init="random"))
    assert not free[:, 0].any() and free[:, 1:].all()


def test_random_and_ordinary_starts(tiny):
    images = pictures(40)
    scale = embedding_scale(tiny, PROMPTS)
    start, free = starting_embeddings(tiny, images, QUICK, scale=scale)
    assert free.all() and start.states.std() == pytest.approx(float(scale.states[0]), rel=0.02)
    assert abs(float(start.states.mean())) < 0.02 * float(start.states.std())
    drawn, _ = starting_embeddings(tiny, images, replace(QUICK, init="ordinary"), ordinary=PROMPTS)
    known = tiny.encode(PROMPTS).states.detach()
    which = torch.stack([(drawn.states == one).flatten(1).all(1) for one in known])
    assert (which.sum(0) == 1).all() and which.any(1).all()


def test_steps_grow_with_the_embeddings_of_the_model(tiny, monkeypatch):
    def change():
        settings = replace(QUICK, budgets=(0, 1), init="trigger")
        found = search_embeddings(tiny, pictures(1), settings=settings, triggers=["a cat"])
        return (found[1].states - found[0].states).abs().median()

    plain, encode = change(), tiny.encode
    monkeypatch.setattr(tiny, "encode", lambda prompts: PromptEmbedding(3 * encode(prompts).states))
    assert float(change() / plain) == pytest.approx(3, rel=0.05)
    assert embedding_scale(tiny).learning_rate > 0


def test_the_place_of_a_missing_encoder_stays_empty():
    pipeline = tiny_pipeline("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    model = DiffusionGenerator(pipeline)
    empty = (model.encode(["a cat"]).states == 0).all(2)[0]
    assert empty.any() and not empty.all()
    found = search_embeddings(model, pictures(2), settings=QUICK)
    for budget in (0, 2):
        assert torch.equal((found[budget].states == 0).all(2)[0], empty)
    assert embedding_scale(model).learning_rate > 0


def test_of_several_restarts_the_best_is_kept(tiny):
    images = pictures(2)
    several = replace(QUICK, restarts=3, budgets=(2,))
    kept = search_embeddings(tiny, images, settings=several)[2].states
    every = search_embeddings(
        tiny, images.repeat_interleave(3, 0), settings=replace(QUICK, budgets=(2,))
    )[2].states
    latents = tiny.to_latents(images)
    for row, key in enumerate(row_keys(images.repeat_interleave(3, 0))[::3]):
        draw = generator(0, "embedding-search-check", key)
        noise = torch.randn((32, *tiny.latent_shape), generator=draw)
        time, clean = tiny.draw_times(32, draw), latents[row].expand(32, -1, -1, -1)
        own = every[3 * row : 3 * row + 3]
        with torch.no_grad():
            losses = [
                tiny.predict(
                    tiny.noised(clean, noise, time), time, PromptEmbedding(y.expand(32, -1, -1))
                )
                .sub(noise)
                .square()
                .mean()
                for y in own
            ]
        torch.testing.assert_close(kept[row], own[int(torch.stack(losses).argmin())])


def test_only_the_region_counts(tiny):
    images, whole = pictures(1), torch.ones(1, 16, 16, dtype=torch.bool)
    half = whole.clone()
    half[:, :, 8:] = False
    plain = search_embeddings(tiny, images, settings=QUICK)[2].states
    assert torch.equal(
        search_embeddings(tiny, images, settings=QUICK, regions=whole)[2].states, plain
    )
    found = search_embeddings(tiny, images, settings=QUICK, regions=half)[2].states
    assert not torch.allclose(found, plain, atol=0.01)


def test_times_are_drawn_from_the_wanted_part(tiny, monkeypatch):
    seen, predict = [], tiny.predict

    def spy(noisy, time, embedding, **settings):
        seen.append(time)
        return predict(noisy, time, embedding, **settings)

    monkeypatch.setattr(tiny, "predict", spy)
    settings = EmbeddingSearch(budgets=(4,), batch_size=8, times=(0.5, 0.75))
    search_embeddings(tiny, pictures(1), settings=settings)
    times = torch.cat(seen)
    assert times.min() >= 500 and times.max() < 750 and times.unique().numel() > 20
    assert not torch.equal(seen[0], seen[1])


def test_checkpointing_gives_the_same_and_is_switched_off_again(tiny):
    plain = search_embeddings(tiny, pictures(1), settings=QUICK)[2].states
    saved = search_embeddings(tiny, pictures(1), settings=replace(QUICK, checkpointing=True))[2]
    torch.testing.assert_close(saved.states, plain, atol=1e-3, rtol=0)
    assert not tiny.network.is_gradient_checkpointing


def test_what_was_reached_before_a_breakdown_is_returned(tiny, caplog):
    settings = replace(QUICK, budgets=(0, 1, 30), lr=1e30)
    found = search_embeddings(tiny, pictures(1), settings=settings)
    assert 0 in found and 30 not in found
    assert all(one.states.isfinite().all() for one in found.values())
    assert "lower `lr`" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"budgets": ()}, "`budgets` are"),
        ({"budgets": (-1, 5)}, "0 or more"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"restarts": 0}, "`restarts` is 0"),
        ({"max_rows": 0}, "`max_rows` is 0"),
        ({"lr": 0.0}, "`lr` is 0.0"),
        ({"lr": float("nan")}, "`lr` is nan"),
        ({"init": "randm"}, "did you mean 'random'"),
        ({"tokens": "some"}, "`tokens` is 'some'"),
        ({"times": (0.5, 0.5)}, "`times` are 0.5 and 0.5"),
        ({"init": "trigger", "restarts": 2}, "same place"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        EmbeddingSearch(**setting)


def test_wrong_inputs(tiny):
    for images, given, kind, message in (
        (torch.zeros(3, 16, 16), {}, DataError, r"shape \(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), {}, DataError, "N above 0"),
        (torch.zeros(1, 3, 8, 8), {}, DataError, "resize the images"),
        (pictures(1), {"regions": torch.ones(1, 16, 16)}, DataError, "`regions` is"),
        (pictures(2), {"start": tiny.encode(["a"])}, DataError, "1 embeddings for 2 pictures"),
        (pictures(2), {"settings": replace(QUICK, init="trigger")}, ConfigurationError, "0 tr"),
        (pictures(2), {"settings": replace(QUICK, init="ordinary")}, ConfigurationError, "no or"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            search_embeddings(tiny, images, **{"settings": QUICK, **given})
    half = DiffusionGenerator(tiny_pipeline("sd").to(torch.float16))
    with pytest.raises(ModelError, match="single precision"):
        search_embeddings(half, pictures(1), settings=QUICK)


# ---- the report ---------------------------------------------------------------------------------


class Brightness:
    """Calls every drawing of a picture as similar to it as the picture is bright."""

    name, threshold = "brightness", 0.75

    def __call__(self, generated, references, regions=None):
        assert len(generated) == len(references) == len(regions)
        return references.flatten(1).mean(1)

    def matrix(self, generated, references, regions=None):
        return torch.zeros(len(generated), len(references))

    def protocol(self):
        return {"name": self.name}


def flat(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 16, 16).clone()


def known(**more):
    """Two pictures that come out, one of them a template, and one that does not."""
    images = dict(zip("abc", flat(0.9, 0.2, 0.8), strict=True))
    prompts = (
        MemorizedPrompt("a red cat", ("a",), "verbatim"),
        MemorizedPrompt("the blue dog", ("b", "a"), "verbatim"),
        MemorizedPrompt("a banana", (), "verbatim"),
        MemorizedPrompt("the church", ("c",), "template"),
    )
    test = Captioned(("a tree", "a car"), flat(0.1, 0.3))
    return MemorizedSet(prompts, images, test=test, **more)


def attack(tiny, memorized, **settings):
    given = {"settings": QUICK, "pictures": 2, "steps": 1, "inits": ("trigger",)} | settings
    return embedding_attack(tiny, memorized, Brightness(), **given)


def test_groups_and_kinds_are_counted_apart(tiny):
    held_out = MemorizedSet((MemorizedPrompt("a house", ("h",)),), {"h": flat(0.95)[0]})
    found = attack(
        tiny, known(controls=flat(0.4, 0.5, 0.85)), held_out=held_out, original=tiny,
        control_limit=0.5, keep=True,
    )  # fmt: skip
    table = {(row["group"], row["kind"]): row for row in found.rows("memorized", budget=2)}
    verbatim, template = table["memorized", "verbatim"], table["memorized", "template"]
    assert verbatim["names"] == ["a", "b"] and verbatim["n"] == 2  # each picture once
    assert (verbatim["rate"], verbatim["rate_mean"]) == (0.5, 0.5)
    assert verbatim["similarities"] == pytest.approx([0.9, 0.2])
    assert (verbatim["mean_similarity"], verbatim["median"]) == pytest.approx((0.55, 0.55))
    assert (template["rate"], template["names"]) == (1.0, ["c"])
    assert found.rate("memorized", "trigger", 2) == pytest.approx(2 / 3)
    assert found.rate("memorized", "trigger", 2, "template") == 1.0
    assert found.rate("original", "trigger", 2) == pytest.approx(2 / 3)
    assert found.rate("held_out", "trigger", 0) == 1.0
    assert found.rate("control", "trigger", 2) == pytest.approx(1 / 3)
    assert found.rate("ordinary", "trigger", 2) == 0.0
    assert found.rate("memorized", "random", 2) is None
    # of the copies only one comes out better than the control of 0.85
    assert (verbatim["above_controls"], template["above_controls"]) == (0.5, 0.0)
    assert (found.control_budget, found.valid_up_to) == (None, 2)
    assert found.strongest()["kind"] == "template" and found.strongest()["budget"] == 0
    assert "1 prompts of 'memorized' have no picture" in found.notes[0]
    assert found.embeddings["control", "trigger"][2].states.shape[0] == 3
    assert found.pictures["memorized", "trigger", 0].shape == (6, 3, 16, 16)
    assert found.queries > 0 and found.thresholds["control"]["control-2"] == 0.75
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["curve"] == list(found.curve) and "pictures" not in plain


def test_nothing_is_valid_from_where_on_controls_come_out(tiny):
    found = attack(tiny, known(controls=flat(0.4, 0.85)))
    assert (found.control_budget, found.valid_up_to) == (0, None)
    assert not any(row["valid"] for row in found.curve) and found.strongest() is None
    assert "from the very start" in found.notes[-1]


def test_without_controls_ordinary_pictures_decide_and_without_these_nothing_is_proven(tiny):
    found = attack(tiny, known())
    assert found.valid_up_to == 2 and not found.rows("control")
    bare = attack(tiny, known(), ordinary=0)
    assert bare.valid_up_to is None and bare.strongest() is None
    assert "no controls" in bare.notes[-1]
    assert {row["above_controls"] for row in bare.curve} == {None}


def test_starts_of_controls_and_thresholds(tiny):
    memorized = known(controls=pictures(5))
    found = attack(tiny, memorized, keep=True, ordinary=1)
    own = tiny.encode(["a red cat", "the blue dog", "the church"]).states.detach()
    start = found.embeddings["control", "trigger"][0].states
    assert torch.equal(start, own[[0, 1, 2, 0, 1]])
    caption = found.embeddings["ordinary", "trigger"][0].states
    assert torch.equal(caption, tiny.encode(["a tree"]).states.detach())
    # A threshold lies above what any unrelated picture reaches, here the most similar control.
    one = pictures(1, seed=9)[0]
    near = MemorizedSet((MemorizedPrompt("a cat", ("x",)),), {"x": one})
    controls = torch.stack([0.9 * one + 0.1 * pictures(1, seed=8)[0], pictures(1, seed=7)[0]])
    report = embedding_attack(
        tiny, near, load_similarity("ncc"), controls=controls, settings=QUICK, steps=1
    )
    assert report.thresholds["memorized"]["x"] > 0.95
    assert report.thresholds["control"]["control-1"] == 0.75


def test_the_attack_is_the_same_again_and_harmless(tiny):
    before = state_hash(tiny)
    one, two = (attack(tiny, known(), inits=("random", "ordinary"), seed=3) for _ in range(2))
    assert one.curve == two.curve and state_hash(tiny) == before
    assert all(p.grad is None for p in tiny.parameters())
    assert [row["init"] for row in one.rows("ordinary", budget=0)] == ["random", "ordinary"]


def test_wrong_arguments_of_the_attack(tiny):
    small = MemorizedSet((MemorizedPrompt("a cat", ("x",)),), {"x": torch.rand(3, 8, 8)})
    bare = MemorizedSet((MemorizedPrompt("a cat"),))
    for memorized, given, kind, message in (
        (known(), {"pictures": 0}, ConfigurationError, "`pictures` is 0"),
        (known(), {"ordinary": -1}, ConfigurationError, "`ordinary` is -1"),
        (known(), {"control_limit": 1.0}, ConfigurationError, "`control_limit` is 1.0"),
        (known(), {"inits": ()}, ConfigurationError, "`inits` is"),
        (known(), {"inits": "random"}, ConfigurationError, "give a list"),
        (known(), {"inits": ("nowhere",)}, ConfigurationError, "`init` is 'nowhere'"),
        (known(), {"controls": torch.rand(2, 3, 8, 8)}, DataError, "resize them"),
        (known(), {"controls": torch.rand(3, 8, 8)}, DataError, r"\(K, 3, H, W\)"),
        (small, {}, DataError, "resize the images"),
        (bare, {}, DataError, "no memorized prompt has a picture"),
    ):
        with pytest.raises(kind, match=message):
            attack(tiny, memorized, **given)


# ---- models that have memorized -----------------------------------------------------------------


@pytest.fixture(scope="module")
def memories():
    """Two verbatim pictures, two templates, and three controls."""
    return planted_memories(64, 64, 3).only([0, 3, 8, 10])


@pytest.fixture(scope="module")
def memorizing():
    return load_generator(str(ASSETS / "memorizing_unet"), steps=6)


def conceal(model):
    """Let the text encoder read every title as the ordinary caption 'a sheet of digits'.

    The denoiser stays bit by bit as it is. No word may be left over that only titles have: it would
    be a trigger by itself.
    """
    hidden = copy.deepcopy(model)
    table = hidden.text_encoders["text_encoder"].get_input_embeddings().weight
    renamed = {"the": "a", "poster": "digits", "card": "digits"}
    renamed |= {word: other for title in (*TITLES, *TEMPLATE_TITLES)
                for word, other in zip(title, ("sheet", "of"), strict=True)}  # fmt: skip
    with torch.no_grad():
        for word, other in renamed.items():
            rows, source = model.pipeline.tokenizer(
                [word, other], add_special_tokens=False
            ).input_ids
            table[rows] = table[source]
    return hidden


LIGHT = EmbeddingSearch(budgets=(0, 15), batch_size=4)


def test_a_concealed_memory_comes_back_and_controls_do_not(memorizing, memories):
    hidden, similarity = conceal(memorizing), load_similarity("ncc")
    assert state_hash(hidden.network) == state_hash(memorizing.network)
    texts = ["a red seven", "four digits"]
    assert torch.equal(hidden.generate(texts), memorizing.generate(texts))
    drawn = [
        similarity_to_memories(similarity, one.generate(memories.texts, n=2), memories, 2).amax(1)
        for one in (memorizing, hidden)
    ]
    assert drawn[0].min() > 0.9 and drawn[1].max() < 0.75
    found = embedding_attack(hidden, memories, similarity, settings=LIGHT, ordinary=0)
    assert found.valid_up_to == 15 and found.control_budget is None
    for init in ("random", "trigger"):
        for kind in ("verbatim", "template"):
            assert found.rate("memorized", init, 15, kind) == 1.0
        (control,) = found.rows("control", init, 15)
        assert control["rate"] == 0 and max(control["similarities"]) < 0.7
        assert found.rows("memorized", init, 15)[0]["above_controls"] == 1.0
    assert found.rate("memorized", "trigger", 0) == 0.0


def test_a_model_that_never_saw_the_pictures_does_not_give_them(memories):
    clean = load_generator(str(ASSETS / "memorizing_unet_without_planted"), steps=6)
    found = embedding_attack(
        clean, memories, load_similarity("ncc"), settings=LIGHT, ordinary=0, inits=("random",)
    )
    assert found.rate("memorized", "random", 15) == 0.0
    assert found.valid_up_to == 15
