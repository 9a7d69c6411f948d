"""SineProject: where it starts, how far it goes, what it leaves."""

from __future__ import annotations

import pytest
import torch

from mmforget.methods import SineProject
from mmforget.methods.kl_minimization import KLMinimization
from mmforget.methods.sine_project import Sine, SineProjection
from mmforget.models.multimodal import MultimodalLM
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.named_patterns import REFUSAL, WORDS, named_patterns
from mmforget.testing.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def shared() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava", WORDS)).eval()


class SineKL(SineProjection, KLMinimization):
    """The same projector with another objective."""


def fitted(method, epochs: int = 1):
    quiet_trainer(max_epochs=epochs).fit(method, datamodule=named_patterns(view=method.view))
    return method


def test_by_hand():
    sine = Sine(torch.tensor([2.0, -1.0]))
    assert sine.right_inverse(torch.ones(2)).tolist() == [0.0, 0.0]
    found = sine(torch.tensor([0.0, torch.pi / 6]))
    assert found.tolist() == pytest.approx([2.0, -0.5])


@torch.no_grad()
def test_training_starts_at_the_original(shared):
    batch = named_patterns().subset("train", "retain")[[0, 1, 2]]
    method = SineProject(shared, refusals=[REFUSAL])
    assert torch.equal(method.model.loss(batch), shared.loss(batch))


def test_no_entry_moves_by_more_than_one(shared):
    method = SineProject(shared, lr=2.0, refusals=[REFUSAL], trained=["projector"])
    result = fitted(method, epochs=2).finalize()
    given = dict(shared.named_parameters())
    assert list(given) == [name for name, _ in result.named_parameters()]
    moved = {
        name: float((p - given[name]).abs().max())
        for name, p in result.named_parameters()
        if not torch.equal(p, given[name])
    }
    weights = {name: change for name, change in moved.items() if name.endswith("weight")}
    assert len(weights) == 2  # both matrices of the projector, with steps of 2
    assert all(0.5 < change <= 1 + 1e-6 for change in weights.values())
    assert any(change > 1.5 for name, change in moved.items() if name.endswith("bias"))
    assert all("multi_modal_projector" in name for name in moved)


def test_another_objective_with_its_reference(shared):
    method = SineKL(shared, lr=1e-2, trained=["language"])
    retain = named_patterns().subset("train", "retain")[[0, 1, 2]]
    fitted(method)
    found = method.original({"retain": retain})["retain"].logits
    with torch.no_grad():
        expected = shared.answer_logits(retain).logits
        moved = method.model.answer_logits(retain).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, expected, atol=1e-2)
    assert method.statistics()["trainable"]["projector"] > 0
