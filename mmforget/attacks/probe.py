"""Linear probe: can the forgotten classes still be read from the frozen features?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

STRENGTHS = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class ProbeResult:
    """Outcome of a linear probe.

    Attributes:
        predicted: (M,) classes of the evaluation samples.
        strength: chosen inverse regularisation C.
        converged: every fit reached its tolerance.
    """

    predicted: np.ndarray
    strength: float
    converged: bool


def linear_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    evaluation: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = 300,
) -> ProbeResult:
    """Fit a multinomial logistic regression on standardised features, classes weighted equally.

    Do not expect chance level of a forgotten class: features of a model that never saw a class
    separate it rather well. Only the gap to the retrained model is evidence.

    Args:
        train: (N, d) features and (N,) labels, forgotten classes included; data on which no model
            was trained (T_attack).
        validation: features and labels on which C is chosen; the smallest C wins a tie.
        evaluation: (M, d) features of T_eval.
        strengths: inverse strengths of the L2 penalty that are tried.
        max_iterations: of each fit.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0].double().numpy())
    x, y = scaler.transform(train[0].double().numpy()), train[1].numpy()
    x_val, y_val = scaler.transform(validation[0].double().numpy()), validation[1].numpy()
    model = LogisticRegression(max_iter=max_iterations, class_weight="balanced", warm_start=True)
    best, best_score, chosen = np.empty(0), -1.0, strengths[0]
    converged = True
    x_eval = scaler.transform(evaluation.double().numpy())
    for strength in sorted(strengths):  # each fit starts from the more strongly penalised one
        model.C = strength
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
            model.fit(x, y)
        converged &= bool(np.max(model.n_iter_) < max_iterations)
        score = float(np.mean(model.predict(x_val) == y_val))
        if score > best_score:
            best, best_score, chosen = model.predict(x_eval), score, strength
    return ProbeResult(best, chosen, converged)
