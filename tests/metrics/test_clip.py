"""CLIPScore and the probability of a concept, against hand-made numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mmforget import DigitWorld
from mmforget.errors import ConfigurationError, DataError, RequestError
from mmforget.metrics.clip import CLIPScore, ConceptProbability, clip_score
from mmforget.metrics.judge import ClipJudge
from mmforget.models.clip import load_clip


@pytest.fixture(scope="module")
def model():
    return load_clip()


@pytest.fixture(scope="module")
def data():
    return DigitWorld().dataset("test")


class Fixed:
    """A judge that reads its answers from the first pixels of a picture."""

    factors = {"digit": ("one", "two")}
    accuracy: dict[str, float] = {}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        first = images[:, 0, 0, 0]
        return {"digit": torch.stack([first, 1 - first], 1)}


def test_clip_score_by_hand():
    cosine = torch.tensor([0.4, -0.3, 1.0])
    assert clip_score(cosine).tolist() == pytest.approx([1.0, 0.0, 2.5])
    assert clip_score(cosine, 100).tolist() == pytest.approx([40.0, 0.0, 100.0])


def test_score_of_pairs(model, data):
    images = data.images(np.arange(6))
    texts = [f"the digit {data.class_names[label]}" for label in data.labels[:6]]
    with torch.no_grad():
        cosine = (model.encode_images(images) * model.encode_texts(texts)).sum(1)
    metric = CLIPScore(model)
    metric.update(images[:4], texts[:4])
    metric.update(images[4:], texts[4:])
    metric.update(images[:0], [])
    assert metric.compute().item() == pytest.approx(2.5 * cosine.clamp(min=0).mean().item(), 1e-5)
    other = CLIPScore(model, weight=100)
    other.update(images, texts)
    assert other.compute() == pytest.approx(metric.compute().item() * 40)


def test_right_texts_score_higher(model, data):
    rows = np.arange(0, 200, 4)
    right = [f"the digit {data.class_names[label]}" for label in data.labels[rows]]
    wrong = [f"the digit {data.class_names[(label + 1) % 10]}" for label in data.labels[rows]]
    scores = []
    for texts in (right, wrong):
        metric = CLIPScore(model)
        metric.update(data.images(rows), texts)
        scores.append(metric.compute().item())
    assert scores[0] > 1.5 * scores[1]


def test_wrong_pairs(model, data):
    metric = CLIPScore(model)
    with pytest.raises(DataError, match="no pictures"):
        metric.compute()
    with pytest.raises(DataError, match="2 images and 1 texts"):
        metric.update(data.images(np.arange(2)), ["one"])
    with pytest.raises(DataError, match="2 images and 1 texts"):
        metric.update(data.images(np.arange(2)), "ab")
    with pytest.raises(RequestError, match="shorten"):
        metric.update(data.images(np.arange(1)), ["red " * 40])


def test_the_owner_of_a_metric_does_not_own_the_model(model):
    owner = torch.nn.Module()
    owner.score = CLIPScore(model)
    assert not list(owner.parameters()) and not owner.state_dict()
    assert copy.deepcopy(owner.score).weight == 2.5


def test_probability_by_hand():
    metric = ConceptProbability(Fixed(), "digit", "two")
    images = torch.zeros(3, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0.1, 0.6, 0.4])
    metric.update(images[:1])
    metric.update(images[1:])
    metric.update(images[:0])
    found = metric.compute()
    assert found["probability"].item() == pytest.approx((0.9 + 0.4 + 0.6) / 3)
    assert found["rate"].item() == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="'two'"):
        ConceptProbability(Fixed(), "digit", "two").compute()
    with pytest.raises(ConfigurationError, match="'three'"):
        ConceptProbability(Fixed(), "digit", "three")


def test_probability_of_real_pictures(model, data):
    judge = ClipJudge(
        model, {"digit": data.class_names}, {"digit": ("{}", "the digit {}", "a picture of a {}")}
    )
    rows = np.flatnonzero(data.labels == 7)[:40]
    found = {}
    for target in ("seven", "three"):
        metric = ConceptProbability(judge, "digit", target)
        metric.update(data.images(rows))
        found[target] = {key: value.item() for key, value in metric.compute().items()}
    assert found["seven"]["rate"] > 0.85 and found["seven"]["probability"] > 0.8
    assert found["three"]["rate"] < 0.1 and found["three"]["probability"] < 0.1
