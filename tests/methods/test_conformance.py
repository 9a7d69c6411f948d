"""The conformance table: every method of the package passes every check."""

from __future__ import annotations

import pytest

from mmforget.methods import (
    SCRUB,
    SSD,
    GSLoRA,
    GSLoRAPlusPlus,
    HeadOnly,
    Identity,
    LogitMask,
    NegGradPlus,
    RandomLabels,
    Retrain,
    SalUn,
)
from mmforget.testing.conformance import MethodChecks

# One row per method: settings that forget one of five classes in a few steps, and their length.
ROWS = {
    "GSLoRA": MethodChecks(lambda m: GSLoRA(m, lr=2e-2, beta=1.0)),
    "GSLoRA-sample": MethodChecks(lambda m: GSLoRA(m, lr=2e-2, beta=1.0, hinge="sample")),
    "GSLoRAPlusPlus": MethodChecks(lambda m: GSLoRAPlusPlus(m, lr=2e-2, beta=1.0, w_retain=0.1)),
    "HeadOnly": MethodChecks(lambda m: HeadOnly(m, lr=0.1), epochs=4),
    "Identity": MethodChecks(Identity),
    "LogitMask": MethodChecks(LogitMask),
    "NegGradPlus": MethodChecks(lambda m: NegGradPlus(m, lr=2e-3, alpha=0.8)),
    "RandomLabels": MethodChecks(lambda m: RandomLabels(m, lr=3e-3, forget_weight=1.0)),
    "Retrain": MethodChecks(Retrain, epochs=6),
    "SCRUB": MethodChecks(lambda m: SCRUB(m, lr=1e-3, w_kl=0.5)),
    "SSD": MethodChecks(lambda m: SSD(m, alpha_rel=0.2)),
    "SSD-fisher": MethodChecks(lambda m: SSD(m, kind="empirical_fisher", alpha_rel=0.3)),
    "SalUn": MethodChecks(lambda m: SalUn(m, lr=3e-3, forget_weight=1.0)),
}


@pytest.mark.parametrize("check", MethodChecks.names())
@pytest.mark.parametrize("row", ROWS)
def test_conformance(row, check):
    ROWS[row].run(check)
