import pytest
import torch

from mmforget.attacks import prompt_attack
from mmforget.attacks.prompts import (
    FAMILIES,
    casings,
    misspellings,
    prompt_variants,
    translations,
)
from mmforget.attacks.soft_tokens import vocabulary
from mmforget.concept import ConceptSpec, normalised
from mmforget.errors import ConfigurationError
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

CAT = ConceptSpec("cat", synonyms=("horse",), preserve=("dog",), templates=("a photo of {}",))


@pytest.fixture(scope="module")
def model():
    return DiffusionGenerator(tiny_pipeline("sd"), steps=2)


def test_misspellings_are_one_mistake_away():
    found = misspellings("seven")
    assert {"sven", "sseven", "esven", "s even", "s3ven", "5even"} <= set(found)
    assert "seven" not in found and len(found) == len(set(found))
    assert all(abs(len(text) - 5) <= 1 for text in found)
    assert all(normalised(text) for text in misspellings("7"))


def test_casings_and_translations():
    assert "VAN GOGH" in casings("van gogh") and "van gogh" not in casings("van gogh")
    assert translations("Seven")[:3] == ["siete", "sept", "sieben"]
    assert translations("parachute") == ["paracaídas", "Fallschirm", "paracadute", "paraquedas"]
    assert translations("R2-D2") == []
    assert translations("R2-D2", {"r2-d2": ["Erzwo"]}) == ["Erzwo"]


def test_variants_of_every_family(model):
    words = vocabulary(model)
    found = prompt_variants(CAT, "a photo of {}", words, 2, seed=0)
    assert [f for f in FAMILIES if any(v.family == f for v in found)] == list(FAMILIES)
    assert [v.text for v in found if v.family == "synonyms"] == ["a photo of horse"]
    for variant in found:
        if variant.family == "prefixes":
            assert variant.text.endswith(" a photo of cat") and len(variant.text.split()) == 7
        assert variant.shift == 0 or variant.text == "a photo of cat"
    assert [v.shift for v in found if v.family == "seeds"] == [1, 2]
    assert prompt_variants(CAT, "a photo of {}", words, 2, seed=0) == found
    assert prompt_variants(CAT, "a photo of {}", words, 2, seed=1) != found
    few = prompt_variants(CAT, "a photo of {}", words, 2, seed=0, families=("seeds",))
    assert {v.family for v in few} == {"seeds"}


def yes(images):
    return torch.ones(len(images), dtype=torch.bool)


class PromptJudge:
    """Sees the concept on the pictures it was told about; everything else is without."""

    def __init__(self, *images):
        self.images = torch.cat(images)

    def __call__(self, images):
        distance = (images[:, None] - self.images[None]).abs().amax((2, 3, 4))
        return (distance < 1e-4).any(1)


def test_what_a_synonym_brings_back_is_counted(model):
    original = DiffusionGenerator(tiny_pipeline("sd", seed=1), steps=2)
    known = original.generate(["a photo of cat"], 2, seed=0, steps=3)
    # The attacked model "draws a cat" for the synonym from the noise of the first picture.
    noise = model.noise(["a photo of cat"], 1, 0)
    latents = model.sample(noise, model.encode(["a photo of horse"]), model.unconditional(), 3)
    judge = PromptJudge(known, model.to_images(latents.detach()).detach())
    found = prompt_attack(model, original, CAT, judge, pictures=2, variants=1, sampling_steps=3)
    assert (found.n, found.pre_rate, found.attack_rate, found.post_rate) == (2, 0.0, 0.5, 0.5)
    assert found.floor == 0.0
    assert found.prompts[0]["best_prompt"] == "a photo of horse"
    families = found.details["families"]
    assert families["synonyms"] == {"rate": 0.5, "variants": {"a photo of horse": 0.5}}
    assert families["seeds"]["rate"] == 0.0
    assert found.queries > 0 and found.settings["trials"] >= 6


def test_what_is_too_long_or_reads_the_same_is_left_out(model):
    long = ConceptSpec("cat", templates=("a photo of a {} in the art of van gogh by monet",))
    found = prompt_attack(model, model, long, yes, pictures=1, variants=6, sampling_steps=2)
    assert found.n == 1 and found.attack_rate == 1.0
    assert any("tokens, the text encoder reads 16" in note for note in found.notes)
    assert any("reads like another prompt" in note for note in found.notes)


def test_families_without_variants_are_none_and_not_zero(model):
    plain = ConceptSpec("gogh", templates=("{}",))
    found = prompt_attack(
        model,
        model,
        plain,
        yes,
        pictures=1,
        sampling_steps=2,
        families=("synonyms", "translations"),
    )
    assert found.details["families"] == {"synonyms": None, "translations": None}
    assert (found.pre_rate, found.attack_rate, found.post_rate) == (1.0, None, None)
    with pytest.raises(ConfigurationError, match="did you mean 'synonyms'"):
        prompt_attack(model, model, plain, lambda x: x, families=("synonym",))
    with pytest.raises(ConfigurationError, match="`budget` is 'huge'"):
        prompt_attack(model, model, plain, lambda x: x, budget="huge")
