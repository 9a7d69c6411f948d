"""The conformance table of the methods that erase named concepts."""

from __future__ import annotations

import pytest

from mmforget.methods.concept_ablation import ConceptAblation
from mmforget.methods.concept_salun import ConceptSalUn
from mmforget.methods.esd import ESD
from mmforget.methods.rece import RECE
from mmforget.methods.sld import SLD
from mmforget.methods.uce import UCE
from mmforget.testing.concept_conformance import ConceptMethodChecks

SHORT = {"steps": 3, "lr": 1e-3, "batch_size": 3, "retain_batch_size": 3}
BANK = SHORT | {"trajectories": 3}
MADE = SHORT | {"pictures": 3, "times": 3}

# One row per method: settings for the mechanics, and settings that erase a digit.
ROWS = {
    "UCE": ConceptMethodChecks(UCE),
    "RECE": ConceptMethodChecks(RECE),
    "ESD-x": ConceptMethodChecks(lambda m, c: ESD(m, c, **BANK)),
    "ESD-x-strict": ConceptMethodChecks(lambda m, c: ESD(m, c, weights="x-strict", **BANK)),
    "ESD-u": ConceptMethodChecks(lambda m, c: ESD(m, c, weights="u", **BANK)),
    "ESD-lora": ConceptMethodChecks(lambda m, c: ESD(m, c, lora_rank=2, **BANK)),
    "ConceptAblation": ConceptMethodChecks(lambda m, c: ConceptAblation(m, c, **MADE)),
    "ConceptSalUn": ConceptMethodChecks(lambda m, c: ConceptSalUn(m, c, weight_decay=0.1, **MADE)),
    "SLD": ConceptMethodChecks(lambda m, c: SLD(m, c, preset="max")),
}


@pytest.mark.parametrize("check", [n for n in ConceptMethodChecks.names() if n != "effect"])
@pytest.mark.parametrize("row", ROWS)
def test_mechanics(row, check):
    ROWS[row].run(check)
