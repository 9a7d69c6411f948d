from __future__ import annotations

import numpy as np
import pytest
import torch

from mmforget.metrics.membership import SCORES, MembershipAUC, rank_auc


def logits(n: int = 40, classes: int = 5, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=chance)
    return scale * torch.randn(n, classes, generator=chance), labels


def test_scaled_confidence_worked_examples() -> None:
    score = SCORES["scaled_confidence"]
    assert float(score(torch.zeros(1, 2), torch.tensor([0]))) == 0.0
    assert float(score(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))) == 1000.0
    assert float(score(torch.tensor([[1000.0, 0.0]]), torch.tensor([1]))) == -1000.0


def test_scores_against_plain_formulas() -> None:
    z, y = logits()
    p = z.double().softmax(1).numpy()
    own = p[np.arange(len(p)), y]
    entropy = -(p * np.log(p)).sum(1)
    modified = []
    for row, label in zip(p, y.tolist(), strict=True):
        value = (1 - row[label]) * np.log(row[label])
        modified.append(
            value + sum(row[j] * np.log(1 - row[j]) for j in range(len(row)) if j != label)
        )
    expected = {
        "neg_loss": np.log(own),
        "confidence": own,
        "scaled_confidence": np.log(own) - np.log(1 - own),
        "neg_entropy": -entropy,
        "neg_modified_entropy": np.array(modified),
        "correct": (p.argmax(1) == y.numpy()).astype(float),
    }
    assert expected.keys() == SCORES.keys()
    for name, values in expected.items():
        assert SCORES[name](z, y).numpy() == pytest.approx(values), name


@pytest.mark.parametrize("name", SCORES)
def test_scores_rank_members_higher_and_stay_finite(name: str) -> None:
    sure = torch.tensor([[1000.0, 0.0, 0.0]])
    unsure = torch.tensor([[0.1, 0.2, 0.0]])
    label = torch.tensor([0])
    high, low = SCORES[name](sure, label), SCORES[name](unsure, label)
    assert torch.isfinite(high).all() and torch.isfinite(low).all()
    assert float(high) > float(low)
    assert torch.isfinite(SCORES[name](sure, torch.tensor([1]))).all()


def test_modified_entropy_does_not_depend_on_other_rows() -> None:
    z, y = logits()
    score = SCORES["neg_modified_entropy"]
    one_by_one = torch.cat([score(z[i : i + 1], y[i : i + 1]) for i in range(len(z))])
    torch.testing.assert_close(score(z, y), one_by_one)


def test_auc_of_identical_scores_is_a_half() -> None:
    scores = np.array([1.0, 1.0, 2.0, 5.0])
    assert float(rank_auc(scores, scores)) == 0.5
    assert float(rank_auc(np.ones(3), np.ones(7))) == 0.5


def test_auc_against_scikit_learn_with_ties_and_in_replicates() -> None:
    from sklearn.metrics import roc_auc_score

    chance = np.random.default_rng(0)
    members, others = chance.integers(0, 6, (3, 30)), chance.integers(0, 5, (3, 20))
    expected = [
        roc_auc_score(np.repeat([1, 0], [30, 20]), np.concatenate([m, o]))
        for m, o in zip(members, others, strict=True)
    ]
    assert rank_auc(members, others) == pytest.approx(expected)


def test_auc_metric_is_the_same_for_any_batches_and_order() -> None:
    chance = torch.Generator().manual_seed(0)
    scores, member = torch.randn(60, generator=chance), torch.arange(60) % 3 == 0
    values = []
    for order in (torch.arange(60), torch.randperm(60, generator=chance)):
        metric = MembershipAUC()
        for part in order.split(17):
            metric.update(scores[part], member[part])
        values.append(float(metric.compute()))
    assert (
        values[0]
        == values[1]
        == pytest.approx(
            float(rank_auc(scores[member].double().numpy(), scores[~member].double().numpy()))
        )
    )
