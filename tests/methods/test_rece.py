"""RECE: derived embeddings bring the concept back, and are erased too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.methods.closed_form import Embedder, gather, times
from mmforget.methods.rece import RECE
from mmforget.methods.uce import UCE
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

FREE: dict[str, Any] = {"max_drift": 1.0, "lambda_rel": 1e-2}


def cat() -> ConceptSpec:
    return ConceptSpec("cat", anchor="", preserve=("dog", "tree"), templates=("a photo of {}",))


def model(kind: Any = "sd") -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind))


@pytest.mark.parametrize("form", ["zero", "standard", "surrogate"])
@torch.no_grad()
def test_derived_rows_bring_the_concept_back(form: Any) -> None:
    """Layer by layer, without the shortcut over the sum of squares."""
    given = model()
    method = RECE(given, cat(), epochs=0, form=form, reg=1e-2, **FREE)
    result = method.finalize()
    embedder = Embedder(given)
    rows = gather(embedder, method.concepts, "all")["states"]
    shared = method.solved(method._rows, method.statistics()["erase_scale"])["states"]
    derived, share = method.derive(rows, method.gram("states"), shared)
    gone = back = 0.0
    for old, new in zip(given.text_layers(), result.text_layers(), strict=True):
        goal = times(old.module.weight, rows.erase.T)
        gone += float((times(new.module.weight, rows.erase.T) - goal).square().sum())
        back += float((times(new.module.weight, derived.erase.T) - goal).square().sum())
    assert back < 0.5 * gone
    assert share == pytest.approx((back / gone) ** 0.5, rel=1e-2)


@torch.no_grad()
def test_zero_form_solves_the_published_system() -> None:
    given = model()
    method = RECE(given, cat(), epochs=0, reg=0.3, **FREE)
    result = method.finalize()
    rows = gather(Embedder(given), method.concepts, "all")["states"]
    shared = method.solved(method._rows, method.statistics()["erase_scale"])["states"]
    found, _ = method.derive(rows, method.gram("states"), shared)
    pairs = list(zip(given.text_layers(), result.text_layers(), strict=True))
    now = sum(new.module.weight.double().T @ new.module.weight.double() for _, new in pairs)
    cross = sum(new.module.weight.double().T @ old.module.weight.double() for old, new in pairs)
    want = rows.erase @ (torch.linalg.inv(0.3 * torch.eye(32).double() + now) @ cross).T
    assert torch.allclose(found.erase, want, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_an_epoch_erases_derived_rows_too(kind: Any) -> None:
    given = model(kind)
    plain, more = UCE(given, cat(), **FREE), RECE(given, cat(), epochs=2, **FREE)
    uce, rece = plain.finalize(), more.finalize()
    assert state_hash(uce.network) != state_hash(rece.network)
    facts = more.statistics()
    assert facts["epochs"] == 2 and all(share < 1 for share in facts["recreated"])
    fresh = model(kind)
    more.weight_edit().apply(fresh)
    for one, other in zip(fresh.text_layers(), rece.text_layers(), strict=True):
        assert torch.allclose(one.module.weight, other.module.weight, atol=1e-5)


def test_no_epochs_is_uce() -> None:
    given = model()
    uce = UCE(given, cat(), **FREE).finalize()
    assert state_hash(RECE(given, cat(), epochs=0, **FREE).finalize()) == state_hash(uce)


def test_score_decides() -> None:
    given = model()
    before = state_hash(given.network)
    scores = iter((0.5, 0.4, 0.6))
    pipes = []

    def score(pipe: Any) -> float:
        pipes.append(state_hash(pipe.unet))
        return next(scores)

    method = RECE(given, cat(), epochs=5, score_fn=score, **FREE)
    result = method.finalize()
    assert method.statistics()["scores"] == [0.5, 0.4]
    assert method.statistics()["epochs"] == 1
    assert before not in pipes and len(set(pipes)) == 3
    assert state_hash(result.network) == pipes[1]


def test_published_defaults_by_kind() -> None:
    for kind, epochs, reg in (("unsafe", 3, 0.1), ("style", 1, 1e-3), ("object", 1, 0.1)):
        concept = ConceptSpec("cat", kind=kind, preserve=("dog",), templates=("{}",))  # type: ignore[arg-type]
        method = RECE(model(), concept)
        assert (method.epochs, method.reg) == (epochs, reg)


@pytest.mark.parametrize("settings", [{"epochs": -1}, {"reg": 0.0}, {"form": "one"}])
def test_settings_without_meaning(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        RECE(model(), cat(), **settings)
