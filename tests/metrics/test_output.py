from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmforget.metrics.output import (
    ZRF,
    ActivationDistance,
    Agreement,
    ClassAccuracy,
    JSDivergence,
    KLFromReference,
    activation_distance,
    agreement,
    class_accuracy,
    js_divergence,
    kl_divergence,
    zrf,
)

LARGE = 1e4


def one_hot(index: int, classes: int) -> torch.Tensor:
    logits = torch.full((1, classes), -LARGE)
    logits[0, index] = LARGE
    return logits


def pair(seed: int = 0, n: int = 50, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(n, classes, generator=chance) for _ in range(2))  # type: ignore[return-value]


def numpy_softmax(logits: torch.Tensor) -> np.ndarray:
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_js_of_different_one_hots_is_ln_2() -> None:
    assert float(js_divergence(one_hot(0, 5), one_hot(3, 5))) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("classes", "expected"), [(10, 0.5256), (100, 0.6651)])
def test_js_of_one_hot_and_uniform(classes: int, expected: float) -> None:
    value = float(js_divergence(one_hot(0, classes), torch.zeros(1, classes)))
    assert value == pytest.approx(expected, abs=1e-4)


def test_js_and_kl_of_an_asymmetric_pair_against_numpy() -> None:
    a, b = pair()
    p, q = numpy_softmax(a), numpy_softmax(b)
    m = (p + q) / 2
    expected = (p * np.log(p / m) + q * np.log(q / m)).sum(1) / 2
    assert js_divergence(a, b).numpy() == pytest.approx(expected)
    assert kl_divergence(a, b).numpy() == pytest.approx((q * np.log(q / p)).sum(1))
    assert not np.allclose(kl_divergence(a, b), kl_divergence(b, a))


def test_js_agrees_with_torchmetrics_mean() -> None:
    from torchmetrics.regression import JensenShannonDivergence

    a, b = pair()
    expected = JensenShannonDivergence()(a.double().softmax(1), b.double().softmax(1))
    assert float(js_divergence(a, b).mean()) == pytest.approx(float(expected), rel=1e-6)


def test_masked_outputs_stay_finite() -> None:
    a, b = pair()
    a[:, 0] = -torch.inf
    for function in (js_divergence, activation_distance, zrf):
        assert torch.isfinite(function(a, b)).all()


def test_zrf_with_itself_as_bad_teacher_is_1() -> None:
    a, _ = pair()
    assert zrf(a, a).numpy() == pytest.approx(1.0)


def test_activation_distance_is_mean_of_norms() -> None:
    a, b = pair()
    expected = np.linalg.norm(numpy_softmax(a) - numpy_softmax(b), axis=1).mean()
    assert float(activation_distance(a, b).mean()) == pytest.approx(expected)
    assert float(activation_distance(one_hot(0, 4), one_hot(1, 4))) == pytest.approx(2**0.5)


def test_agreement_counts_equal_answers() -> None:
    a, b = pair()
    assert agreement(a, b).numpy() == pytest.approx((a.argmax(1) == b.argmax(1)).double().numpy())
    assert float(agreement(a, a).mean()) == 1.0


def test_class_accuracy_against_a_loop_and_without_samples() -> None:
    a, _ = pair(classes=4)
    labels = torch.arange(50) % 3  # class 3 has no sample
    found = class_accuracy(a, labels)
    for label in range(3):
        mask = labels == label
        assert float(found[label]) == float((a[mask].argmax(1) == label).double().mean())
    assert torch.isnan(found[3])


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (JSDivergence, js_divergence),
        (KLFromReference, kl_divergence),
        (ActivationDistance, activation_distance),
        (Agreement, agreement),
        (ZRF, zrf),
    ],
)
def test_metrics_are_sample_means_for_any_batches(metric: type, function: object) -> None:
    a, b = pair()
    expected = float(function(a, b).mean())  # type: ignore[operator]
    for sizes in ([50], [1, 30, 19]):
        own = metric()
        for x, y in zip(a.split(sizes), b.split(sizes), strict=True):
            own.update(x, y)
        assert float(own.compute()) == pytest.approx(expected)


def test_class_accuracy_metric_equals_function() -> None:
    a, _ = pair(classes=4)
    labels = torch.arange(50) % 3
    metric = ClassAccuracy(num_classes=4)
    for x, y in zip(a.split(20), labels.split(20), strict=True):
        metric.update(x, y)
    torch.testing.assert_close(metric.compute(), class_accuracy(a, labels), equal_nan=True)
