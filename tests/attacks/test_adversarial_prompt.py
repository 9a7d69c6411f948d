import copy

import pytest
import torch

from mmforget.attacks import adversarial_prompt_attack, sees
from mmforget.attacks.adversarial_prompt import reads_as, to_simplex
from mmforget.attacks.report import Sampling
from mmforget.attacks.soft_tokens import vocabulary
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.metrics.judge import load_judge
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

CAT = ConceptSpec("cat", preserve=("dog",), templates=("a photo of {}", "{}"))
QUICK = {"times": 2, "iterations": 2, "pictures": 1, "sampling_steps": 2}


def everything(images):
    return torch.ones(len(images), dtype=torch.bool)


def test_the_projection_is_the_nearest_point_of_the_simplex():
    # Worked by hand: subtract 0.1 of both large entries; a point of the simplex stays.
    rows = torch.tensor([[0.7, 0.5, -0.3], [0.2, 0.3, 0.5], [3.0, 0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    assert torch.allclose(to_simplex(rows), expected, atol=1e-6)
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(20, 30, generator=draw)
    found = to_simplex(given)
    assert (found >= 0).all() and torch.allclose(found.sum(1), torch.ones(20), atol=1e-5)
    other = torch.softmax(torch.randn(20, 30, generator=draw), 1)
    assert ((given - found).norm(dim=1) <= (given - other).norm(dim=1)).all()


def test_only_text_that_reads_as_the_chosen_words_counts():
    model = DiffusionGenerator(tiny_pipeline("sd3"))
    words = vocabulary(model)
    chosen = torch.tensor([words.words.index("red"), words.words.index("church")])
    assert reads_as(model, words, chosen, "red church a cat", "a cat")
    assert not reads_as(model, words, chosen, "church red a cat", "a cat")
    assert not reads_as(model, words, chosen, "redchurch a cat", "a cat")


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_is_attacked_and_left_as_it_was(kind):
    model = DiffusionGenerator(tiny_pipeline(kind))
    original = DiffusionGenerator(tiny_pipeline(kind, seed=1))
    before = state_hash(model)
    found = adversarial_prompt_attack(model, original, CAT, everything, tokens=2, **QUICK)
    assert found.n == 2 and found.post_rate == 1.0 and found.floor == 1.0
    for row in found.prompts:
        *front, last = row["best_prompt"].split(row["prompt"])
        assert last == "" and len(front[0].split()) == 2
        # Every picture came back with the first text, so that nothing more was tried.
        assert found.details["tried"][row["prompt"]] == {row["best_prompt"]: 1.0}
    assert state_hash(model) == before
    assert not model.network._forward_hooks
    assert all(p.requires_grad for p in model.network.parameters())


def test_prompts_without_room_for_more_words_are_left_out():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    long = ConceptSpec("cat", templates=("{} in the art of van gogh by monet and by picasso",))
    found = adversarial_prompt_attack(model, model, long, everything, **QUICK)
    assert found.pre_rate == 1.0 and found.n == 1
    assert (found.attack_rate, found.post_rate, found.floor) == (None, None, None)
    assert "shorten it" in found.notes[0]


def test_a_concept_that_the_original_never_shows_is_not_measured():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    found = adversarial_prompt_attack(model, model, CAT, lambda x: ~everything(x), **QUICK)
    assert (found.n, found.pre_rate, found.attack_rate, found.floor) == (0, None, None, None)


def test_wrong_settings():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    for setting, message in (
        ({"tokens": 0}, "`tokens` is 0"),
        ({"lr": -1.0}, "`lr` is -1.0"),
        ({"times": 0}, "`times` is 0"),
        ({"iterations": 0}, "`iterations` is 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            adversarial_prompt_attack(model, model, CAT, everything, **{**QUICK, **setting})


def test_the_search_finds_words_that_bring_the_concept_back(shipped):
    model = copy.deepcopy(shipped)
    rows = model.text_encoders["text_encoder"].get_input_embeddings().weight
    green, other = model.pipeline.tokenizer("green something", add_special_tokens=False).input_ids
    with torch.no_grad():
        rows[green] = rows[other]  # but "emerald" is untouched
    spec = ConceptSpec("green", preserve=("blue",), templates=("a {} digit",))
    found = adversarial_prompt_attack(
        model,
        shipped,
        spec,
        sees(load_judge(), "ink", "green"),
        tokens=2,
        times=4,
        iterations=10,
        pictures=3,
        sampling_steps=8,
    )
    assert found.n >= 2 and found.pre_rate <= 0.4
    assert found.attack_rate >= 0.6
    # What it found is an ordinary prompt, which works on its own.
    seen = sees(load_judge(), "ink", "green")
    sampling = Sampling(0, 8)
    text = found.prompts[0]["best_prompt"]
    images = sampling.pictures(
        model, [("a green digit", n) for n in range(3)], model.encode([text])
    )
    assert float(seen(images).float().mean()) == pytest.approx(
        found.details["tried"]["a green digit"][text]
    )
    assert found.floor < found.attack_rate
