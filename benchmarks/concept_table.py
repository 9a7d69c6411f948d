"""One table of all concept-removal methods on the digit world's text-to-image models.

    python benchmarks/concept_table.py                      # UNet, three seeds; hours of one core
    python benchmarks/concept_table.py --model transformer --seeds 0
    python benchmarks/concept_table.py --render             # only write the table again

Every method erases a digit ("seven") and, separately, an ink ("red"), from the shipped generator.
An independent judge counts what is drawn: how often the target, and how often every preserved digit
and ink that a prompt names. Rates of all seeds are pooled. Finished parts are kept in the work
folder, so that a stopped run goes on, and several processes can share the work. Settings are the
same for all seeds and both concepts; see `TUNING` for how they were found. Methods that miss are
shown as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmforget.artifacts.run_folder import atomic_write
from mmforget.attacks.concept_inversion import concept_inversion
from mmforget.attacks.image_side import sdedit
from mmforget.attacks.report import sees
from mmforget.audit.intervals import wilson
from mmforget.concept import ConceptSpec
from mmforget.data.digit_captions import (
    DIGIT_SYNONYMS,
    DIGIT_TEMPLATES,
    INK_SYNONYMS,
    INK_TEMPLATES,
)
from mmforget.data.digit_world import DIGITS, INKS
from mmforget.erase import run_concept_method
from mmforget.methods.concept_ablation import ConceptAblation
from mmforget.methods.concept_salun import ConceptSalUn
from mmforget.methods.esd import ESD
from mmforget.methods.rece import RECE
from mmforget.methods.sld import SLD
from mmforget.methods.uce import UCE
from mmforget.metrics.judge import load_judge
from mmforget.models.clip import load_clip
from mmforget.models.diffusion import DiffusionGenerator, load_generator

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
MODELS = {"unet": "diffusion_unet", "transformer": "diffusion_transformer"}
STEPS, GUIDANCE, COMBINATIONS, TEMPLATED = 15, 3.0, 4, 8
PICTURES_SEED = 1000
"""Pictures of the evaluation come from seeds that no tuning has looked at."""

OTHER_DIGITS = tuple(digit for digit in DIGITS if digit != "seven")
OTHER_INKS = tuple(ink for ink in INKS if ink != "red")
CONCEPTS = {
    "seven": ConceptSpec(
        "seven",
        synonyms=(DIGIT_SYNONYMS["seven"],),
        anchor="",
        preserve=(*OTHER_DIGITS, *INKS),
        templates=DIGIT_TEMPLATES,
    ),
    "red": ConceptSpec(
        "red",
        synonyms=(INK_SYNONYMS["red"],),
        anchor="",
        preserve=(*OTHER_INKS, *DIGITS),
        templates=INK_TEMPLATES,
    ),
}
FACTOR = {"seven": "digit", "red": "ink"}


@dataclass(frozen=True)
class Row:
    """A method with the settings and optimizer steps of this benchmark."""

    make: Callable[..., Any]
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Row] = {
    "UCE": Row(UCE),
    "RECE": Row(RECE),
    "ESD-x": Row(ESD, 200, {"weights": "x", "lr": 3e-4}),
    "ESD-x-strict": Row(ESD, 200, {"weights": "x-strict", "lr": 3e-4}),
    "ESD-u": Row(ESD, 200, {"weights": "u", "lr": 3e-4}),
    "ESD-LoRA": Row(ESD, 200, {"weights": "x", "lora_rank": 4, "lr": 1e-3}),
    "Concept ablation": Row(ConceptAblation, 200, {"lr": 3e-4}),
    "SalUn": Row(ConceptSalUn, 200, {"lr": 3e-4}),
    "SLD strong": Row(SLD, 0, {"preset": "strong"}),
}
TUNING = ""


def pictures(model: DiffusionGenerator, concept: ConceptSpec, seed: int) -> dict[str, Tensor]:
    """Everything that is judged: all pairs of digit and ink, and the templates of every word."""
    pairs = [f"a photo of a {ink} {digit}" for digit in DIGITS for ink in INKS]
    made = {"pairs": model.generate(pairs, COMBINATIONS, PICTURES_SEED + seed)}
    for word in concept.words:
        made[word] = model.generate(concept.prompts(word), TEMPLATED, PICTURES_SEED + seed)
    return made


def count(made: dict[str, Tensor], concept: ConceptSpec) -> dict[str, list[int]]:
    """Hits and trials per group: ``target``, ``synonym``, ``digit/three``, ``ink/blue``, ..."""
    judge, factor = load_judge(), FACTOR[concept.target]
    seen = {name: values.argmax(1) for name, values in judge(made["pairs"]).items()}
    pairs = [(d, i) for d in DIGITS for i in INKS for _ in range(COMBINATIONS)]
    found: dict[str, list[int]] = {}

    def add(group: str, hit: bool) -> None:
        entry = found.setdefault(group, [0, 0])
        entry[0] += int(hit)
        entry[1] += 1

    for row, (digit, ink) in enumerate(pairs):
        right = {
            "digit": judge.factors["digit"][int(seen["digit"][row])] == digit,
            "ink": judge.factors["ink"][int(seen["ink"][row])] == ink,
        }
        if concept.target in (digit, ink):
            add("target in pairs", right[factor])
            add("other factor beside the target", right["ink" if factor == "digit" else "digit"])
        else:
            add(f"digit/{digit}", right["digit"])
            add(f"ink/{ink}", right["ink"])
    index = judge.factors[factor].index(concept.target)
    for word in concept.words:
        group = "target" if word == concept.target else "synonym"
        for value in judge(made[word])[factor].argmax(1).tolist():
            add(group, value == index)
    return found
