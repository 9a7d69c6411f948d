"""UCE: what the edit does to layers, sequences of requests, refusals, effect on pictures."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.data.digit_captions import DIGIT_TEMPLATES, INK_TEMPLATES
from mmforget.data.digit_world import DIGITS, INKS
from mmforget.errors import ConfigurationError, ModelError, NoOpError, RequestError
from mmforget.methods.uce import UCE
from mmforget.metrics.judge import load_judge
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.weight_edit import WeightEdit
from mmforget.testing.tiny_pipelines import tiny_pipeline

KINDS = ("sd", "sdxl", "sd3", "flux")
FREE: dict[str, Any] = {"max_drift": 1.0}
"""Random encoders tell words apart poorly, so that the default would weaken the edit."""


def cat(**changes: Any) -> ConceptSpec:
    settings = {
        "anchor": "house",
        "preserve": ("dog", "tree"),
        "templates": ("{}", "a photo of {}"),
    }
    return ConceptSpec("cat", **(settings | changes))


def model(kind: Any = "sd", **settings: Any) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind, **settings))


def weights(found: DiffusionGenerator) -> dict[str, Tensor]:
    return {layer.name: layer.module.weight.detach() for layer in found.text_layers()}


def close(one: DiffusionGenerator, other: DiffusionGenerator, tolerance: float) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.allclose(mine[n], theirs[n], rtol=0, atol=tolerance) for n in mine)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_answer_as_to_the_anchor(kind: Any) -> None:
    given = model(kind)
    method = UCE(given, cat(templates=("{}",)), scope="last", lambda_rel=1e-9, **FREE)
    result = method.finalize()
    words = given.encode(["cat", "house", "dog"])
    last = [int(given.segments([w])[0].content[0].sum()) for w in ("cat", "house", "dog")]
    last = [given.segments(["cat"])[0].begin + count - 1 for count in last]
    for old, new in zip(given.text_layers(), result.text_layers(), strict=True):
        if old.reads == "states":
            cat_, house, dog = (words.states[i, place] for i, place in enumerate(last))
        else:
            cat_, house, dog = words.pooled
        before, after = old.module.weight[:, : old.columns], new.module.weight[:, : new.columns]
        scale = float((before @ house).abs().max())
        assert torch.allclose(after @ cat_, before @ house, atol=1e-4 * scale), old.name
        assert (after @ dog - before @ dog).norm() < 1e-3 * (before @ dog).norm(), old.name
        assert not torch.allclose(before @ cat_, before @ house, atol=1e-2 * scale)
        # The bias, and what SDXL says about the size of the picture, are left alone.
        assert torch.equal(old.module.weight[:, old.columns :], new.module.weight[:, new.columns :])
        if old.module.bias is not None:
            assert torch.equal(old.module.bias, new.module.bias)
    assert state_hash(given.network) == state_hash(model(kind).network)


@pytest.mark.parametrize("technique", ["replace", "project"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_weight_edit_is_the_edit(kind: Any, technique: Any, tmp_path: Path) -> None:
    given = model(kind)
    method = UCE(given, cat(), technique=technique, **FREE)
    result = method.finalize()
    method.save_adapter(tmp_path)
    edit = WeightEdit.load(tmp_path)
    assert edit.metadata["concepts"][0]["target"] == "cat"
    fresh = model(kind)
    edit.apply(fresh)  # checks the base
    assert close(fresh, result, 1e-6)
    assert not close(given, result, 1e-3)
    assert edit.rank == method.statistics()["rank"]


@torch.no_grad()
def test_project_removes_the_own_component() -> None:
    given = model("sd")
    concept = cat(templates=("{}",))
    result = UCE(
        given, concept, scope="last", technique="project", lambda_rel=1e-9, **FREE
    ).finalize()
    row = given.encode(["cat"]).states[0, 1]
    for name, after in weights(result).items():
        own = weights(given)[name] @ row
        assert abs(float((after @ row) @ own / own.norm() ** 2)) < 1e-3, name


def test_bias_does_not_matter() -> None:
    given, other = model("flux"), model("flux")
    with torch.no_grad():
        for layer in other.text_layers():
            layer.module.bias += 5
    one, two = (UCE(m, cat(), **FREE) for m in (given, other))
    assert close(one.finalize(), two.finalize(), 1e-7)


def test_half_precision_gives_the_same_edit() -> None:
    single, half = model("sd"), model("sd")
    # The same weights, rounded in both, so that only the computation differs.
    half.pipeline.unet.to(torch.float16)
    single.network.load_state_dict(half.network.state_dict())
    # The pipeline hands half-precision embeddings to a half-precision network; so does this one.
    norm = single.pipeline.text_encoder.final_layer_norm
    norm.register_forward_hook(lambda module, args, output: output.half().float())
    methods = [UCE(m, cat(), **FREE) for m in (single, half)]
    one, two = (weights(method.finalize()) for method in methods)
    for name, after in one.items():
        assert two[name].dtype == torch.float16 and two[name].isfinite().all()
        assert (after - weights(single)[name]).norm() > 0.1 * after.norm()
        assert (two[name].float() - after).norm() < 1e-3 * after.norm(), name


def test_stronger_ridge_changes_less() -> None:
    moved = []
    for ridge in (1e-3, 1e9):
        given = model("sd")
        result = UCE(given, cat(), lambda_rel=ridge, scope="last_to_end", **FREE).finalize()
        moved.append(sum(float((weights(result)[n] - w).norm()) for n, w in weights(given).items()))
    assert moved[0] > 0.1 and moved[1] < 1e-6 * moved[0]


# ---- several concepts ---------------------------------------------------------------------------


def test_together_one_after_another_and_the_other_way_round() -> None:
    given = model("sdxl")
    one = cat(anchor="", preserve=("tree", "monet"))
    two = ConceptSpec("monet", anchor="", preserve=("dog",))

    def in_turn(*concepts: ConceptSpec) -> DiffusionGenerator:
        current: DiffusionGenerator = given
        state: dict[str, Tensor] = {}
        for concept in concepts:
            method = UCE(current, concept, scope="last_to_end", **FREE)
            method.inherit(state)
            current = method.finalize()
            state = method.carry()
        return current

    together = UCE(
        given, [cat(anchor="", preserve=("tree",)), two], scope="last_to_end", **FREE
    ).finalize()
    first = in_turn(one, two)
    assert close(first, together, 1e-6)
    assert close(in_turn(two, cat(anchor="", preserve=("tree",))), together, 1e-6)
    assert not close(UCE(given, two, scope="last_to_end", **FREE).finalize(), together, 1e-3)


def test_inherited_edit_belongs_to_the_original() -> None:
    given = model("sd")
    method = UCE(given, cat(), **FREE)
    current = method.finalize()
    second = UCE(current, ConceptSpec("monet", preserve=("dog",)), **FREE)
    second.inherit(method.carry())
    result = second.finalize()
    fresh = model("sd")
    second.weight_edit().apply(fresh)
    assert close(fresh, result, 1e-6)


def test_contradicting_requests_are_refused() -> None:
    method = UCE(model("sd"), cat(anchor="monet"), **FREE)
    current = method.finalize()
    second = UCE(current, ConceptSpec("monet", preserve=("dog",)), **FREE)
    with pytest.raises(RequestError, match="another anchor"):
        second.inherit(method.carry())


# ---- choices that are made for the user ---------------------------------------------------------


def test_neighbours_are_named(caplog: pytest.LogCaptureFixture) -> None:
    method = UCE(model("sd"), ConceptSpec("cat", templates=("{}",)), **FREE)
    with caplog.at_level(logging.WARNING):
        method.finalize()
    chosen = method.statistics()["preserved_by_default"]
    assert chosen and "cat" not in chosen
    assert all(word in caplog.text for word in chosen) and "no `preserve`" in caplog.text


def test_drift_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    free = UCE(model("sd"), cat(), scope="last_to_end", max_drift=1.0)
    free.finalize()
    limit = free.statistics()["drift"] / 2
    tight = UCE(model("sd"), cat(), scope="last_to_end", max_drift=limit)
    tight.finalize()
    facts = tight.statistics()
    assert facts["drift"] <= limit
    assert facts["erase_scale"] < 1 == free.statistics()["erase_scale"]
    assert facts["leak"] > free.statistics()["leak"]
    with caplog.at_level(logging.WARNING):
        UCE(model("sd"), cat(), max_drift=1e-3).finalize()
    assert "the edit is weak" in caplog.text


def test_scope_escalates_while_it_leaks() -> None:
    method = UCE(model("sd"), cat(), **FREE)
    method.finalize()
    facts = method.statistics()
    tried = list(facts["leak_by_scope"])
    assert tried == ["last", "last_to_end", "all"][: len(tried)] and facts["scope"] == tried[-1]
    assert all(facts["leak_by_scope"][s] > 0.2 for s in tried[:-1])
    assert len(tried) == 3 or facts["leak"] <= 0.2
    # With this random encoder, the end tokens say what the last token says.
    assert len(tried) > 1


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings,word",
    [
        ({"lambda_rel": -1e-3}, "lambda_rel"),
        ({"lam": float("nan")}, "lam"),
        ({"erase_scale": 0.0}, "erase_scale"),
        ({"preserve_scale": -1.0}, "preserve_scale"),
        ({"max_drift": 0.0}, "max_drift"),
        ({"scope": "last_to_eos"}, "last_to_end"),
        ({"technique": "tensor"}, "replace"),
    ],
)
def test_settings_without_meaning(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word) as caught:
        UCE(model("sd"), cat(), **settings)
    assert "\n" not in str(caught.value)


def test_no_ridge_with_dependent_rows() -> None:
    given = model("sd")  # 32 columns, and more rows
    before = state_hash(given.network)
    with pytest.raises(ConfigurationError, match="lambda_rel"):
        UCE(given, cat(), scope="all", lambda_rel=0.0, copy=False, **FREE).finalize()
    assert state_hash(given.network) == before


def test_quantised_layers() -> None:
    given = model("sd")
    layer = given.text_layers()[0].module
    layer.weight = nn.Parameter((layer.weight * 50).to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        UCE(given, cat())


def test_off_loaded_layers() -> None:
    given = model("sd")
    layer = given.text_layers()[0].module
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    with pytest.raises(ModelError, match="offloaded"):
        UCE(given, cat(), copy=False)


def test_words_that_the_encoder_cannot_tell_apart() -> None:
    given = model("sd")
    with torch.no_grad():  # an encoder that says the same to everything
        given.pipeline.text_encoder.final_layer_norm.weight.zero_()
    with pytest.raises(NoOpError, match="equals a preserved one"):
        UCE(given, cat()).finalize()


def test_no_edit_yet() -> None:
    with pytest.raises(ConfigurationError, match="finalize"):
        UCE(model("sd"), cat()).weight_edit()


def test_edit_in_place_can_be_undone() -> None:
    given = model("sd")
    before = state_hash(given.network)
    method = UCE(given, cat(), copy=False, **FREE)
    assert method.finalize() is given and state_hash(given.network) != before
    assert state_hash(method.restore().network) == before


# ---- effect on pictures -------------------------------------------------------------------------

ASSETS = Path(str(resources.files("mmforget"))) / "assets" / "digit_world"


def seen(found: DiffusionGenerator, prompts: dict[str, str], factor: str) -> dict[str, float]:
    """Per prompt the share of six pictures in which the judge sees the value."""
    judge = load_judge()
    pictures = found.generate(list(prompts), 6, 0, steps=10, guidance=3.0)
    values = judge(pictures)[factor].argmax(1).view(len(prompts), 6)
    wanted = [judge.factors[factor].index(value) for value in prompts.values()]
    return {
        prompt: float((row == value).double().mean())
        for prompt, row, value in zip(prompts, values, wanted, strict=True)
    }


def check_effect(
    concept: ConceptSpec, factor: str, gone: dict[str, str], kept: dict[str, str]
) -> None:
    given = load_generator(ASSETS / "diffusion_unet")
    before = seen(given, gone | kept, factor)
    assert min(before.values()) > 0.6, f"the original does not draw all of it: {before}"
    result = UCE(given, concept).finalize()
    after = seen(result, gone | kept, factor)
    assert sum(after[p] for p in gone) / len(gone) <= 0.3, after
    lost = [before[p] - after[p] for p in kept]
    assert sum(lost) / len(kept) <= 0.15, after


def test_an_ink_is_erased() -> None:
    concept = ConceptSpec(
        "red",
        synonyms=("scarlet",),
        anchor="",
        preserve=tuple(ink for ink in INKS if ink != "red") + tuple(DIGITS),
        templates=INK_TEMPLATES,
    )
    gone = {"something in scarlet ink": "red", "a photo of a red two": "red"}
    kept = {"a blue digit": "blue", "a photo of a green five": "green"}
    check_effect(concept, "ink", gone, kept)


def test_a_digit_is_erased() -> None:
    concept = ConceptSpec(
        "seven",
        synonyms=("7",),
        anchor="",
        preserve=tuple(digit for digit in DIGITS if digit != "seven") + tuple(INKS),
        templates=DIGIT_TEMPLATES,
    )
    gone = {"a photo of the digit 7": "seven", "a red seven": "seven"}
    kept = {"the digit three": "three", "a blue one": "one"}
    check_effect(concept, "digit", gone, kept)
