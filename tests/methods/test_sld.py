"""SLD: the formula, its presets, warm-up, and that it changes no weight."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.errors import CapabilityError, ConfigurationError, WeightsError
from mmforget.methods.sld import SLD, UNSAFE_TERMS
from mmforget.models.base import state_hash
from mmforget.models.diffusion import GUIDANCE_FILE, DiffusionGenerator, load_generator
from mmforget.models.guidance import PRESETS, SafeGuidance, load_guidance
from mmforget.testing.tiny_pipelines import tiny_pipeline

SPEC = ConceptSpec("van gogh", synonyms=("monet",))


def generator_of(kind: str = "sd", steps: int = 12) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=steps)


def predictions(seed: int, prompts: int = 1) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    c, p = (torch.randn(2, 4, 3, 3, generator=draw) * 0.01 for _ in range(2))
    return c, p, torch.randn(prompts, 2, 4, 3, 3, generator=draw) * 0.01


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_element_by_element(name):
    guidance = SafeGuidance.preset(name, ["x"])
    delta, s_s, lam, s_m, beta = PRESETS[name]
    state: dict[str, torch.Tensor] = {}
    nu = [0.0] * 72
    for step in range(18):
        c, p, s = predictions(step)
        found = guidance.guide(step, c, p, s, 3.0, state).reshape(-1)
        rows = zip(*(part.reshape(-1).tolist() for part in (c, p, s)), strict=True)
        for k, (e_c, e_0, e_s) in enumerate(rows):
            phi = min(1.0, abs(e_c - e_s) * s_s)
            mu = phi if e_c - e_s < lam else 0.0
            gamma = mu * (e_s - e_0) + s_m * nu[k]
            nu[k] = beta * nu[k] + (1 - beta) * gamma
            expected = e_0 + 3.0 * (e_c - e_0 - (gamma if step >= delta else 0.0))
            assert float(found[k]) == pytest.approx(expected, abs=1e-6)


def test_presets_are_those_of_the_paper():
    assert PRESETS["weak"] == (15, 200, 0, 0, 0)
    assert PRESETS["medium"] == (10, 1000, 0.01, 0.3, 0.4)
    assert PRESETS["strong"] == (7, 2000, 0.025, 0.5, 0.7)
    assert PRESETS["max"] == (0, 5000, 1.0, 0.5, 0.7)
    assert len(set(UNSAFE_TERMS)) == 20
    model = generator_of(steps=20)
    assert SLD(model, SPEC).guidance == SafeGuidance.preset("medium", ["van gogh, monet"])
    own = SLD(model, SPEC, preset="strong", warmup=2, momentum=0.0).guidance
    assert (own.warmup, own.scale, own.momentum) == (2, 2000, 0)


def test_warm_up_counts_steps_and_gathers_momentum():
    guidance = SafeGuidance(("x",), warmup=3, scale=1000, threshold=1.0, momentum=0.5, decay=0.5)
    without = SafeGuidance(("x",), warmup=3, scale=1000, threshold=1.0, momentum=0.0, decay=0.5)
    state: dict[str, torch.Tensor] = {}
    fresh: dict[str, torch.Tensor] = {}
    for step in range(4):
        c, p, s = predictions(step)
        plain = p + 3.0 * (c - p)
        found = guidance.guide(step, c, p, s, 3.0, state)
        assert torch.equal(found, plain) == (step < 3)
    assert state["momentum"].any()
    other = without.guide(3, *predictions(3), 3.0, fresh)
    assert not torch.allclose(found, other)


def test_a_scale_below_one_is_plain_guidance_bit_for_bit(caplog):
    model = generator_of()
    with caplog.at_level(logging.WARNING):
        result = SLD(model, SPEC, preset="max", scale=0.5).finalize()
    assert "does nothing with scale=0.5" in caplog.text
    prompts = ["van gogh", "a cat"]
    assert torch.equal(result.generate(prompts), model.generate(prompts))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_pictures_change_and_weights_do_not(kind, caplog):
    model = generator_of(kind)
    method = SLD(model, SPEC, preset="max")
    with caplog.at_level(logging.WARNING):
        result = method.finalize()
    assert not caplog.text
    assert not method.no_op
    assert state_hash(result) == state_hash(model)
    assert model.guider is None
    assert not torch.equal(result.generate(["van gogh"]), model.generate(["van gogh"]))


def test_several_concepts_have_a_prompt_each():
    method = SLD(generator_of(), [SPEC, ConceptSpec("a cat")], preset="max")
    assert method.guidance.prompts == ("van gogh, monet", "a cat")
    c, p, s = predictions(0, prompts=2)
    both, one, other = (method.guidance.guide(0, c, p, part, 3.0, {}) for part in (s, s[:1], s[1:]))
    plain = p + 3.0 * (c - p)
    torch.testing.assert_close(both - plain, (one - plain) + (other - plain))


def test_the_saved_folder_leads_away_again_and_diffusers_alone_does_not(tmp_path):
    from diffusers import StableDiffusionPipeline

    model = generator_of()
    result = SLD(model, SPEC, preset="max").finalize()
    result.save_native(tmp_path)
    assert json.loads((tmp_path / GUIDANCE_FILE).read_text())["guidance"] == "SafeGuidance"
    loaded = load_generator(tmp_path, steps=12)
    assert loaded.guider == result.guider
    assert torch.equal(loaded.generate(["van gogh"]), result.generate(["van gogh"]))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    plain = DiffusionGenerator(pipeline, steps=12).generate(["van gogh"])
    assert torch.equal(plain, model.generate(["van gogh"]))


def test_what_does_nothing_is_said(caplog):
    model = generator_of(steps=5)
    with caplog.at_level(logging.WARNING):
        SLD(model, SPEC)
        model.guidance = 1.0
        SLD(model, SPEC, preset="max")
    assert "in 5 sampling steps" in caplog.text
    assert "at guidance 1" in caplog.text


def test_refusals():
    with pytest.raises(CapabilityError, match="FLUX"):
        SLD(generator_of("flux"), SPEC)
    with pytest.raises(ConfigurationError, match="did you mean 'strong'"):
        SLD(generator_of(), SPEC, preset="strog")
    with pytest.raises(ConfigurationError, match=r"`decay` is 1\.0"):
        SLD(generator_of(), SPEC, decay=1.0)
    method = SLD(generator_of(), SPEC, preset="max")
    method.finalize()
    with pytest.raises(ConfigurationError, match="edits no weights"):
        method.weight_edit()
    with pytest.raises(ConfigurationError):
        SafeGuidance(("",))


def test_guidance_files_are_checked():
    good = SafeGuidance.preset("weak", ["x", "y"]).to_dict()
    assert load_guidance(json.loads(json.dumps(good))) == SafeGuidance.preset("weak", ["x", "y"])
    with pytest.raises(WeightsError, match="'Other'"):
        load_guidance(good | {"guidance": "Other"})
    with pytest.raises(WeightsError, match="did you mean 'warmup'"):
        load_guidance(good | {"warm": 3})
    del good["prompts"]
    with pytest.raises(WeightsError, match="no `prompts`"):
        load_guidance(good)
