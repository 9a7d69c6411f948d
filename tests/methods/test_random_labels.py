"""RandomLabels: which labels are drawn, and from what they depend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmforget.errors import RequestError
from mmforget.methods import RandomLabels
from mmforget.methods.random_labels import draw_other
from mmforget.models import ImageClassifier
from mmforget.request import ForgetRequest
from mmforget.testing.patterns import PatternData, pattern_model


@pytest.fixture
def model() -> ImageClassifier:
    return pattern_model()


def bound(method: RandomLabels, *requests: ForgetRequest) -> RandomLabels:
    data = PatternData()
    data.request(*requests)
    method.bind(data)
    return method


def test_labels_are_never_of_a_class_that_is_or_was_forgotten(model):
    requests = (ForgetRequest(classes=(3,)), ForgetRequest(classes=(1, 2)))
    method = bound(RandomLabels(model), *requests)
    drawn = method.draw(torch.arange(500), torch.full((500,), 1))
    assert sorted(set(drawn.tolist())) == [0, 4]
    assert abs((drawn == 0).double().mean() - 0.5) < 0.1


def test_labels_are_never_the_true_one_for_single_samples(model):
    method = bound(RandomLabels(model), ForgetRequest(samples=(1, 2, 3)))
    true = torch.arange(5000) % 5
    drawn = method.draw(torch.arange(5000), true)
    assert not (drawn == true).any()
    counts = torch.bincount((drawn - true) % 5, minlength=5)[1:]
    assert counts.min() > 1100  # of 1250


def test_all_classes_may_be_drawn_if_wanted(model):
    method = bound(RandomLabels(model, exclude_true=False), ForgetRequest(classes=(1,)))
    drawn = method.draw(torch.arange(500), torch.full((500,), 1))
    assert sorted(set(drawn.tolist())) == [0, 1, 2, 3, 4]


def test_a_label_depends_on_the_sample_and_not_on_its_batch(model):
    method = bound(RandomLabels(model), ForgetRequest(classes=(1,)))
    true = torch.full((100,), 1)
    together = method.draw(torch.arange(100), true)
    order = torch.randperm(100)
    assert torch.equal(method.draw(order, true), together[order])
    other = bound(RandomLabels(model, seed=1), ForgetRequest(classes=(1,)))
    assert not torch.equal(other.draw(torch.arange(100), true), together)


@pytest.mark.parametrize("resample", [True, False])
def test_labels_are_drawn_anew_in_each_epoch(model, resample, monkeypatch):
    method = bound(RandomLabels(model, resample=resample), ForgetRequest(classes=(1,)))
    true = torch.full((100,), 1)
    first = method.draw(torch.arange(100), true)
    monkeypatch.setattr(RandomLabels, "current_epoch", 1)
    assert torch.equal(method.draw(torch.arange(100), true), first) is not resample


def test_the_loss_is_that_of_the_drawn_labels(model):
    method = bound(RandomLabels(model, forget_weight=0.5), ForgetRequest(classes=(1,)))
    data = method.data
    forget = data.subset("train", "forget")[[0, 1, 2, ~0]]
    retain = data.subset("train", "retain")[[0, 1, 2]]
    terms = method.losses({"forget": forget, "retain": retain})
    wrong = forget | {"label": method.draw(forget["id"], forget["label"])}
    torch.testing.assert_close(terms["forget"], 0.5 * model.loss(wrong)[:3].mean())
    torch.testing.assert_close(terms["retain"], model.loss(retain).mean())


def test_no_label_left():
    with pytest.raises(RequestError, match="no wrong label"):
        draw_other(np.array([0.5]), np.array([2]), np.array([2]))
    # forgetting all but one class leaves that one
    assert draw_other(np.array([0.9]), np.array([1]), np.array([2])).tolist() == [2]
