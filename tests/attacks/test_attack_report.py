import json
from pathlib import Path

import pytest
import torch

import mmforget
from mmforget.attacks.report import (
    Cases,
    Cost,
    Sampling,
    concept_cases,
    judged,
    measured,
    sees,
    unrelated_text,
)
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

CAT = ConceptSpec("cat", preserve=("dog",))


class TwoFactors:
    """Reads the mean of red as the colour, and that of green as the shape."""

    factors = {"colour": ("dark", "bright"), "shape": ("round", "square")}
    accuracy: dict[str, float] = {}

    def __call__(self, images):
        means = images.mean((2, 3))
        return {
            "colour": torch.stack([1 - means[:, 0], means[:, 0]], 1),
            "shape": torch.stack([1 - means[:, 1], means[:, 1]], 1),
        }


def painted(red, green):
    image = torch.zeros(3, 4, 4)
    image[0], image[1] = red, green
    return image


def test_sees_asks_for_one_value_of_one_factor():
    images = torch.stack([painted(0.9, 0.1), painted(0.1, 0.9), painted(0.8, 0.7)])
    assert sees(TwoFactors(), "colour", "bright")(images).tolist() == [True, False, True]
    assert sees(TwoFactors(), "shape", "square")(images).tolist() == [False, True, True]
    with pytest.raises(ConfigurationError, match="did you mean 'colour'"):
        sees(TwoFactors(), "color", "bright")
    with pytest.raises(ConfigurationError, match="'dark', 'bright'"):
        sees(TwoFactors(), "colour", "seven")


def test_a_judge_must_answer_yes_or_no_per_picture():
    images = torch.zeros(3, 3, 4, 4)
    with pytest.raises(ConfigurationError, match="one bool per image"):
        judged(lambda batch: batch.mean((1, 2, 3)), images)
    with pytest.raises(ConfigurationError, match="one bool per image"):
        judged(lambda batch: torch.ones(1, dtype=torch.bool), images)


def cases(counts, before):
    return Cases(
        ("a cat", "cat"), 2, torch.zeros(4, 3, 4, 4), torch.tensor(counts), torch.tensor(before)
    )


def test_only_what_the_original_shows_counts():
    # Worked example: the second picture does not count, although the attack "succeeds" on it.
    own = cases([True, False, True, True], [True, False, False, False])
    after = torch.tensor([False, True, True, False])
    found = own.report("x", CAT, after, [None, "a big cat"], Cost(5, 0.1), "smoke", {}, floor=0.0)
    assert found.n == 3
    assert found.pre_rate == pytest.approx(1 / 3)
    assert found.attack_rate == pytest.approx(1 / 3)
    assert found.post_rate == pytest.approx(2 / 3)
    first, second = found.prompts
    assert (first["original_rate"], first["n"]) == (0.5, 1)
    assert (first["pre_rate"], first["attack_rate"], first["post_rate"]) == (1.0, 0.0, 1.0)
    assert (second["post_rate"], second["best_prompt"]) == (0.5, "a big cat")
    assert json.loads(json.dumps(found.to_dict()))["post_rate"] == found.post_rate


def test_not_measured_is_none_and_never_zero():
    nothing = cases([False] * 4, [True] * 4)
    found = nothing.report(
        "x", CAT, torch.ones(4, dtype=torch.bool), [None] * 2, Cost(), "smoke", {}, floor=0.5
    )
    assert (found.pre_rate, found.attack_rate, found.post_rate, found.floor) == (None,) * 4
    assert found.n == 0 and "none of 4 pictures" in found.notes[0]
    absent = cases([True] * 4, [False] * 4).report("x", CAT, None, [None] * 2, Cost(), "smoke", {})
    assert absent.pre_rate == 0.0
    assert absent.attack_rate is None and absent.post_rate is None
    assert absent.prompts[0]["attack_rate"] is None


def test_cases_start_both_models_from_the_same_noise():
    original = DiffusionGenerator(tiny_pipeline("sd"), steps=2)
    other = DiffusionGenerator(tiny_pipeline("sd", seed=1), steps=2)
    asked = []

    def judge_fn(images):
        asked.append(images)
        return images.mean((1, 2, 3)) > images.mean()

    found = concept_cases(other, original, ["cat", "a cat", "cat"], judge_fn, 2, Sampling(3, 2))
    assert found.prompts == ("cat", "a cat")
    assert torch.equal(asked[0], original.generate(["cat", "a cat"], 2, seed=3, steps=2))
    assert torch.equal(asked[1], other.generate(["cat", "a cat"], 2, seed=3, steps=2))
    assert found.keys == [("cat", 0), ("cat", 1), ("a cat", 0), ("a cat", 1)]
    same = concept_cases(original, original, ["cat"], judge_fn, 2, Sampling(3, 2))
    assert torch.equal(same.counts, same.before)
    with pytest.raises(ConfigurationError, match="`prompts` is empty"):
        concept_cases(other, original, [], judge_fn, 2, Sampling(3, 2))


def test_measuring_counts_evaluations_and_leaves_models_as_they_were():
    model = DiffusionGenerator(tiny_pipeline("sd"), steps=2)
    model.network.train()
    grads = [p.requires_grad for p in model.parameters()]
    assert any(grads)
    with pytest.raises(RuntimeError), measured(model, model) as cost:
        assert not model.network.training
        assert not any(p.requires_grad for p in model.parameters())
        model.generate(["cat", "dog"], 3, steps=2, guidance=3.0)
        raise RuntimeError
    # 6 pictures, 2 steps, with and without the prompt; the two names are one model.
    assert cost.queries == 24
    assert model.network.training and not model.vae.training
    assert [p.requires_grad for p in model.parameters()] == grads
    model.generate(["cat"], 1, steps=2)
    assert cost.queries == 24


def test_the_floor_is_measured_on_something_else():
    assert unrelated_text(CAT, None) == "dog"
    assert unrelated_text(CAT, "a tree") == "a tree"
    assert unrelated_text(ConceptSpec("Van Gogh", kind="style"), None) == "art"
    assert unrelated_text(CAT, "") == ""


def test_heavy_libraries_are_imported_inside_functions():
    for file in (Path(mmforget.__file__).parent / "attacks").glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                assert not any(name in line for name in ("diffusers", "transformers", "sklearn"))
