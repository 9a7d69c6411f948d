from __future__ import annotations

from typing import Any

import pytest
import torch

from mmforget.audit.controls import make_controls, random_init
from mmforget.audit.protocol import accuracies
from mmforget.errors import ConfigurationError, ModelError
from mmforget.models.base import state_hash
from mmforget.models.classifier import ImageClassifier
from mmforget.request import ForgetRequest


def test_controls_do_what_their_names_say(original: ImageClassifier, digits: Any) -> None:
    before, view = state_hash(original), digits.view
    identity, masked, head = make_controls(original, digits, max_epochs=3)
    assert state_hash(original) == before
    assert digits.view == view and digits.trainer is None
    assert identity.entry.hash == before
    for control in (masked, head):
        found = {row["split"]: row["accuracy"] for row in accuracies(control.model, digits)}
        assert found["forget"] < 0.2 and found["retain"] > 0.8
        own, first = control.model.state_dict(), original.state_dict()
        changed = {name for name in own if not torch.equal(own[name], first[name])}
        assert changed == {"network.10.weight", "network.10.bias"}
    assert head.entry.cost["retain_sample_passes"] > 0
    assert {c.entry.role for c in (identity, masked, head)} == {"control"}


def test_unknown_controls_are_refused_before_any_work(
    original: ImageClassifier, digits: Any
) -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'identity'"):
        make_controls(original, digits, ("logit_mask", "identiti"))


def test_no_mask_for_a_request_of_samples(original: ImageClassifier, digits: Any) -> None:
    ids = digits.dataset("train").ids[:20].tolist()
    digits.request(ForgetRequest(samples=tuple(ids)))
    found = make_controls(original, digits, ("identity", "logit_mask"))
    assert [control.entry.name for control in found] == ["identity"]


def test_random_init_inherits_nothing(original: ImageClassifier) -> None:
    anchor = random_init(original)
    assert anchor.entry.role == "random_init"
    own, first = anchor.model.network[0].weight, original.network[0].weight  # type: ignore[index]
    assert not (own == first).any()
    assert state_hash(random_init(original).model) == anchor.entry.hash


def test_random_init_of_a_given_network_is_refused(original: ImageClassifier) -> None:
    with pytest.raises(ModelError):
        random_init(ImageClassifier(original.network, num_classes=10))
