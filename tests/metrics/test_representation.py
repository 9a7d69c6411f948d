from __future__ import annotations

import numpy as np
import pytest
import torch

from mmforget.metrics.representation import (
    KNNAccuracy,
    LinearCKA,
    knn_predict,
    linear_cka,
    linear_cka_biased,
    procrustes,
)


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, d, 5)).Q


def hsic_by_definition(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased HSIC of Song et al. (2012), equation 5, with explicit matrices."""
    k, m = (x @ x.T).double().numpy(), (y @ y.T).double().numpy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    b, one = len(k), np.ones(len(k))
    value = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((b - 1) * (b - 2))
    return float((value - 2 / (b - 2) * (one @ k @ m @ one)) / (b * (b - 3)))


def cka_by_definition(x: torch.Tensor, y: torch.Tensor) -> float:
    both = hsic_by_definition(x, y)
    return both / (hsic_by_definition(x, x) * hsic_by_definition(y, y)) ** 0.5


def test_cka_is_invariant_to_rotation_and_scale() -> None:
    x = gaussian(300, 20, 0) + 7
    y = 3 * x @ rotation(20)
    assert linear_cka(x, y, 64)[0] == pytest.approx(1, abs=1e-6)
    assert linear_cka_biased(x, y) == pytest.approx(1, abs=1e-6)


def test_cka_of_independent_features_is_zero_where_the_biased_one_is_not() -> None:
    x, y = gaussian(2048, 2048, 0), gaussian(2048, 2048, 1)
    assert abs(linear_cka(x, y, 512)[0]) < 0.02
    assert linear_cka_biased(x[:512, :512], y[:512, :512]) == pytest.approx(0.5, abs=0.02)


def test_cka_follows_the_definition_and_its_jackknife_leaves_one_out() -> None:
    x = gaussian(30, 6, 0) + 2
    y = x[:, :4] + 0.5 * gaussian(30, 4, 1)
    value, error = linear_cka(x, y, 30)
    assert value == pytest.approx(cka_by_definition(x, y))
    left = []
    for index in range(30):
        keep = torch.arange(30) != index
        left.append(cka_by_definition(x[keep], y[keep]))
    expected = np.sqrt(29 / 30 * np.square(np.array(left) - np.mean(left)).sum())
    assert error == pytest.approx(expected)


def test_full_batch_cka_does_not_depend_on_the_order() -> None:
    x = gaussian(100, 8, 0)
    y = x + gaussian(100, 8, 1)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    assert linear_cka(x, y, 100)[0] == pytest.approx(linear_cka(x[order], y[order], 100)[0])


def test_cka_hardly_depends_on_the_partition() -> None:
    x = gaussian(2000, 8, 0)
    y = x + gaussian(2000, 8, 1)
    values = [linear_cka(x, y, size)[0] for size in (50, 200, 2000)]
    assert max(values) - min(values) < 0.02


def test_cka_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        linear_cka(gaussian(4, 3, 0), gaussian(4, 3, 1))


def test_cka_metric_equals_function_and_drops_a_small_last_batch() -> None:
    x = gaussian(103, 8, 0)
    y = x + gaussian(103, 8, 1)
    metric = LinearCKA()
    for a, b in zip(x.split(50), y.split(50), strict=True):
        metric.update(a, b)
    assert float(metric.compute()) == pytest.approx(linear_cka(x[:100], y[:100], 50)[0])


def test_procrustes_is_zero_for_a_rotation_and_large_for_noise() -> None:
    x = gaussian(200, 8, 0)
    assert procrustes(x, 2 * x @ rotation(8) + 1) == pytest.approx(0, abs=1e-9)
    assert procrustes(x, gaussian(200, 8, 1)) > 0.8


def test_knn_against_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    labels = torch.arange(150) % 3
    features = gaussian(150, 5, 0) + 2 * torch.nn.functional.one_hot(labels, 5)
    gallery, query = features[:100], features[100:]
    other = KNeighborsClassifier(5, metric="cosine").fit(gallery, labels[:100])
    share = other.predict_proba(query.numpy())
    clear = np.sort(share, axis=1)[:, -1] > np.sort(share, axis=1)[:, -2]  # ties differ
    found = knn_predict(gallery, labels[:100], query, 3, chunk=7).numpy()
    assert (found[clear] == share.argmax(1)[clear]).all()
    assert clear.sum() > 40


def test_knn_gives_ties_to_the_closer_class() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    query = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    assert knn_predict(gallery, labels, query, 2, k=4).tolist() == [0, 1]


def test_knn_metric_equals_function() -> None:
    labels, features = torch.arange(90) % 3, gaussian(90, 5, 0)
    known = torch.arange(90) % 2 == 0
    metric = KNNAccuracy(num_classes=3)
    for part in torch.arange(90).split(25):
        metric.update(features[part], labels[part], known[part])
    predicted = knn_predict(features[known], labels[known], features[~known], 3)
    expected = (predicted == labels[~known]).double().mean()
    assert float(metric.compute()) == float(expected)
