"""ESD: its targets, the sets of weights, low-rank factors, and what it does."""

from __future__ import annotations

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.data.denoising import trajectory_records
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.denoiser_weights import select_weights
from mmforget.methods.esd import ESD
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

SPEC = ConceptSpec("van gogh", preserve=("monet",))
FAST = {"steps": 3, "trajectories": 2, "lr": 1e-3}


def generator_of(kind: str = "sd") -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=3)


def fitted(method: ESD, steps: int = 2) -> ESD:
    quiet_trainer(max_steps=steps).fit(method)
    return method


def changed(method: ESD, model: DiffusionGenerator) -> set[str]:
    """Layers of the denoiser whose parameters differ."""
    after = method.model.network.state_dict()
    return {
        name.rpartition(".")[0]
        for name, value in model.network.state_dict().items()
        if not torch.equal(value, after[name])
    }


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_without_a_concept_the_target_is_the_unconditional_prediction(eta):
    model = generator_of()
    method = ESD(model, SPEC, eta=eta, **FAST)
    records = trajectory_records(model, [""], method._away, 2, 3, 3.0, 0)
    plain = trajectory_records(model, [""], lambda a, b, _: b, 2, 3, 3.0, 0)
    torch.testing.assert_close(records.target, plain.target, rtol=1e-3, atol=1e-5)


def test_released_scripts_count_from_one_more():
    """Their target e(c) - k (e(c) - e(0)) with k = eta + 1."""
    model = generator_of()
    records = ESD(model, SPEC, eta=1.5, **FAST).forget_records()
    released = trajectory_records(
        model, ["van gogh"], lambda c, p, _: c - 2.5 * (c - p), 1, 3, 3.0, 0
    )
    rows = [int((records.noisy - one).flatten(1).abs().sum(1).argmin()) for one in released.noisy]
    torch.testing.assert_close(records.target[rows], released.target, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_preserved_concepts_keep_their_own_predictions():
    model = generator_of()
    records = ESD(model, SPEC, **FAST).retain_records()
    assert set(records.prompts) <= set(SPEC.prompts("monet"))
    table = model.encode(list(records.prompts))
    found = model.predict(records.noisy, records.time, table[records.prompt])
    torch.testing.assert_close(records.target, found, rtol=1e-3, atol=1e-4)


def test_several_concepts_have_records_in_proportion_to_their_weight():
    concepts = [
        ConceptSpec("van gogh", synonyms=("church",), templates=("{}", "a photo of {}")),
        ConceptSpec("a dog", templates=("{}",), weight=2.0),
    ]
    records = ESD(generator_of(), concepts, steps=3, trajectories=4).forget_records()
    shares = {text: 0 for text in records.prompts}
    for index in records.prompt.tolist():
        shares[records.prompts[index]] += 1
    assert shares == {
        "van gogh": 3,
        "a photo of van gogh": 3,
        "church": 3,
        "a photo of church": 3,
        "a dog": 24,
    }


@torch.no_grad()
def test_an_attribute_is_taken_from_what_keeps_being_used():
    spec = ConceptSpec("a red car", kind="attribute", erase_from="a car", templates=("{}",))
    model = generator_of()
    records = ESD(model, spec, eta=1.0, **FAST).forget_records()
    assert records.prompts == ("a car",)
    kept, gone, empty = (
        model.predict(records.noisy, records.time, model.encode([text])[records.prompt * 0])
        for text in ("a car", "a red car", "")
    )
    torch.testing.assert_close(records.target, kept - 2 * (gone - empty), rtol=1e-3, atol=1e-4)


# ---- sets of weights ----------------------------------------------------------------------------


def names(kind: str, weights: str) -> list[str]:
    return [site.name for site in select_weights(generator_of(kind), weights)]


def test_sets_of_a_unet():
    everything = names("sd", "all")
    cross = names("sd", "x")
    assert len(cross) % 4 == 0
    assert {name.rpartition("attn2.")[2] for name in cross} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert names("sd", "x-strict") == [n for n in cross if n.endswith(("to_k", "to_v"))]
    rest = names("sd", "u")
    assert not set(rest) & set(cross)
    outside = set(everything) - set(rest) - set(cross)
    assert outside == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert {name.rpartition("attn1.")[2] for name in names("sd", "selfattn")} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }


def test_sets_of_transformers():
    assert all(".attn.add_" in n or n.endswith(".attn.to_add_out") for n in names("sd35", "x"))
    assert {n.rpartition(".")[2] for n in names("flux", "x-strict")} == {"add_k_proj", "add_v_proj"}
    # Dual attention is attention of the picture to itself, whatever it is called.
    assert any(".attn2." in name for name in names("sd35", "selfattn"))
    assert not any(".attn2." in name for name in names("sd35", "x"))
    wide = set(names("flux", "x-wide")) - set(names("flux", "x"))
    assert wide == {f"single_transformer_blocks.0.attn.to_{part}" for part in "kv"}
    rest = names("flux", "u")
    assert rest
    assert all(name.startswith("transformer_blocks.") for name in rest)
    assert not set(rest) & set(names("flux", "x"))


def test_an_empty_set_is_refused():
    with pytest.raises(CapabilityError, match="x-wide"):
        ESD(generator_of(), SPEC, weights="x-wide", **FAST)
    with pytest.raises(ConfigurationError, match="did you mean 'x-strict'"):
        ESD(generator_of(), SPEC, weights="x_strict", **FAST)


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("weights", ["x", "x-strict", "u"])
def test_only_the_chosen_weights_move(kind, weights):
    model = generator_of(kind)
    method = fitted(ESD(model, SPEC, weights=weights, **FAST))
    moved = changed(method, model)
    assert moved <= set(names(kind, weights))
    # The last block of the text stream may have layers without influence.
    assert len(moved) >= 0.8 * len(names(kind, weights))
    assert state_hash(method.model.text_encoders) == state_hash(model.text_encoders)


# ---- low rank -----------------------------------------------------------------------------------


def test_low_rank_factors_are_merged_and_kept():
    model = generator_of()
    method = ESD(model, SPEC, lora_rank=2, **FAST)
    with pytest.raises(ConfigurationError, match="`finalize`"):
        method.weight_edit()
    result = fitted(method).finalize()
    edit = method.weight_edit()
    assert edit.kind == "lora"
    assert set(edit.factors) == set(names("sd", "x"))
    before, after = model.network.state_dict(), result.network.state_dict()
    assert list(before) == list(after)
    for name, (up, down) in edit.factors.items():
        assert (up.shape[1], down.shape[0]) == (2, 2)
        change = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert change.any()
        torch.testing.assert_close(change, up @ down, rtol=1e-4, atol=1e-6)
    assert changed(method, model) == set(names("sd", "x"))
    result.text_layers()  # refuses a network with adapters


def test_low_rank_factors_start_the_same_whatever_the_global_generator_was():
    hashes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        hashes.append(state_hash(ESD(generator_of(), SPEC, lora_rank=2, **FAST)))
    assert hashes[0] == hashes[1]


# ---- effect -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_concept_moves_towards_the_target_and_the_preserved_one_stays():
    model = generator_of()
    method = ESD(model, SPEC, steps=3, trajectories=4, weights="u", lr=3e-3)
    with torch.enable_grad():
        fitted(method, steps=40)
    errors = {}
    for name, records in method.records.items():
        table = model.encode(list(records.prompts))[records.prompt]
        old, new = (m.predict(records.noisy, records.time, table) for m in (model, method.model))
        errors[name] = [float((found - records.target).square().mean()) for found in (old, new)] + [
            float((new - old).square().mean())
        ]
    assert errors["forget"][1] < 0.8 * errors["forget"][0]
    assert errors["retain"][0] == pytest.approx(0.0, abs=1e-8)
    assert errors["retain"][2] < errors["forget"][2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -1.0}, "eta = k - 1"),
        ({"trajectories": 0}, "`trajectories` is 0"),
        ({"retain_trajectories": 0}, "`retain_trajectories` is 0"),
        ({"steps": 0}, "`steps` is 0"),
        ({"lora_rank": 0}, "`lora_rank` is 0"),
        ({"guidance": 1.0}, "`guidance` is 1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ESD(generator_of(), SPEC, **(FAST | settings))
