"""Results of an invented audit: two requests on digits. The numbers mean nothing."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import pytest

from mmforget.audit.results import Check, MetricResult, ModelEntry, Results, Verdict

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MODELS = [
    ModelEntry("original", "original", "a1" * 32, "assets/digits-vit"),
    ModelEntry(
        "unlearned",
        "unlearned",
        "b2" * 32,
        "this run",
        "GSLoRAPlusPlus",
        {"forget_inputs": True, "forget_labels": True, "retain": "fraction", "retain_labels": True},
        {"seconds": 11.1, "sample_passes": 10101.0, "retain_samples": 1111},
        {"zero_groups": 3, "groups": 12, "changed_share": 0.0111},
    ),
    ModelEntry("retrained-1", "retrained", "c3" * 32, "retrained, seed 1"),
    ModelEntry("retrained-2", "retrained", "c4" * 32, "retrained, seed 2"),
    ModelEntry("held-out", "held_out", "d5" * 32, "retrained, seed 3"),
    ModelEntry("Identity", "control", "a1" * 32, "control", "Identity"),
    ModelEntry("LogitMask", "control", "e7" * 32, "control", "LogitMask"),
    ModelEntry("HeadOnly", "control", "e8" * 32, "control", "HeadOnly"),
    ModelEntry("random-init", "random_init", "f9" * 32, "fresh weights"),
]
TABLE: list[tuple[str, str, str, str, str, tuple[float, float] | None, list[float | None]]] = [
    # metric, family, split, direction, unit, range, values in the order of MODELS
    ("accuracy", "forgetting", "test_forget", "closer_to_retrained", "fraction", (0, 1),
     [0.99, 0.0, 0.0, 0.0, 0.0, 0.99, 0.0, 0.01]),
    ("accuracy", "forgetting", "test_previous", "closer_to_retrained", "fraction", (0, 1),
     [0.97, 0.0, 0.0, 0.0, 0.0, 0.97, 0.0, 0.02]),
    ("accuracy", "utility", "test_retain", "higher", "fraction", (0, 1),
     [0.981, 0.978, 0.982, 0.979, 0.98, 0.981, 0.984, 0.983]),
    ("retain_drop", "utility", "test_retain", "lower", "fraction", (-1, 1),
     [0.0, 0.003, -0.001, 0.002, 0.001, 0.0, -0.003, -0.002]),
    ("h_mean", "forgetting", "test_forget", "higher", "fraction", (0, 1),
     [0.0, 0.984, 0.985, 0.984, 0.985, 0.0, 0.987, 0.981]),
    ("membership_auc", "privacy", "train_forget", "closer_to_retrained", "fraction", (0, 1),
     [0.62, 0.52, 0.5, 0.51, 0.49, 0.62, 0.61, 0.6]),
    ("cka_to_original", "representation", "test_forget", "closer_to_retrained", "", (-1, 1),
     [1.0, 0.42, 0.55, 0.57, 0.56, 1.0, 1.0, 1.0]),
    ("probe_recall", "representation", "test_forget", "closer_to_retrained", "fraction", (0, 1),
     [0.99, 0.86, 0.88, 0.9, 0.89, 0.99, 0.99, 0.99]),
    ("relearn_steps_full", "relearning", "test_forget", "closer_to_retrained", "steps", None,
     [0.0, None, 31.0, 29.0, 30.0, 0.0, 2.0, 3.0]),
    ("sample_passes", "cost", "", "lower", "passes", None,
     [None, 10101.0, 1111111.0, 1111111.0, 1111111.0, None, None, None]),
    ("seconds", "cost", "", "lower", "seconds", None,
     [None, 11.1, 222.2, 222.0, 221.9, None, None, None]),
    ("peak_memory_bytes", "cost", "", "lower", "bytes", None,
     [None, 55e6, 44e6, 44e6, 44e6, None, None, None]),
]  # fmt: skip


def picture(text: str, background: tuple[int, int, int]) -> str:
    """A base64 PNG with one character."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (32, 32), background)
    ImageDraw.Draw(image).text((12, 10), text, fill=(240, 240, 120))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def metrics() -> list[MetricResult]:
    """All rows of the table; one is censored, one failed."""
    rows = []
    for metric, family, split, direction, unit, bounds, values in TABLE:
        for entry, value in zip(MODELS, [*values, 0.0], strict=True):
            if family == "cost" and not value:
                continue
            censored = value is None
            half = 0.012 if unit == "fraction" and value is not None else None
            rows.append(
                MetricResult(
                    metric,
                    entry.name,
                    family,  # type: ignore[arg-type]
                    value,
                    direction,  # type: ignore[arg-type]
                    split,
                    unit,
                    low=bounds[0] if bounds else None,
                    high=bounds[1] if bounds else None,
                    n=None if family == "cost" else 111,
                    ci_low=max(bounds[0], value - half) if half and bounds else None,
                    ci_high=min(bounds[1], value + half) if half and bounds else None,
                    ci_method="Wilson" if half else "",
                    censored=censored,
                    note="> 50 steps" if censored else "",
                    details={"progress": 0.97, "retrained_z": 0.4}
                    if entry.role == "unlearned" and family != "cost" and not censored
                    else {},
                )
            )
    failed = "RuntimeError: invented failure of a metric"
    rows.append(
        MetricResult(
            "knn_accuracy", "unlearned", "representation", None, "none", "test_forget", error=failed
        )
    )
    return rows


def curves() -> dict[str, list[dict[str, Any]]]:
    """Two requests of six epochs, and two relearning rates with two seeds."""
    forgetting: list[dict[str, Any]] = []
    for step in (1, 2):
        for epoch in range(1, 7):
            shares = {"forget": max(0.0, 0.98 - 0.25 * epoch), "retain": 0.98 - 0.004 * epoch}
            if step == 2:
                shares["previous"] = 0.0
            forgetting += [
                {"step": step, "epoch": epoch, "split": split, "accuracy": value}
                for split, value in shares.items()
            ]
    speed = {"original": 9.0, "unlearned": 0.6, "retrained-1": 0.3, "retrained-2": 0.4,
             "held-out": 0.52, "Identity": 8.0, "LogitMask": 4.0, "HeadOnly": 3.5,
             "random-init": 0.05}  # fmt: skip
    relearning = [
        {"model": model, "learning_rate": rate, "seed": seed, "step": step,
         "accuracy": 1 - 1 / (1 + 20 * rate * factor * step + 0.01 * seed)}
        for model, factor in speed.items()
        for rate in (0.001, 0.01)
        for seed in (0, 1)
        for step in range(0, 51, 5)
    ]  # fmt: skip
    return {"forgetting": forgetting, "relearning": relearning, "relearning_head": relearning}


def make() -> Results:
    """The whole of it."""
    gone = {3: "three", 8: "eight"}
    kept = [0.98, 0.99, 0.97, 0.96, 0.98, 0.97, 0.99, 0.98, 0.97, 0.95]
    forgot = [0.0 if index in gone else value - 0.01 for index, value in enumerate(kept)]
    spread = [0.05, 0.02, 0.21, 0.0, 0.01, 0.31, 0.06, 0.04, 0.0, 0.3]
    before = [0.0, 0.0, 0.01, 0.49, 0.0, 0.01, 0.0, 0.0, 0.48, 0.01]
    return Results(
        title="Digit world: forget three, then eight (invented numbers)",
        goal="untraining",
        requests=[
            {"classes": ["three"], "samples": [], "goal": "untraining", "name": "first",
             "reason": "a private reason"},
            {"classes": [8], "samples": [], "goal": "untraining", "name": "second", "reason": ""},
        ],
        data={
            "name": "digit-world",
            "hash": "1a" * 32,
            "split_hash": "2b" * 32,
            "sizes": {"train/forget": 111, "train/retain": 999, "test/missing": 0},
            "class_names": list(NAMES),
        },
        models=list(MODELS),
        metrics=metrics(),
        checks=[
            Check("forget accuracy", True, "0.0 % on test images of eight, at most 2 % asked"),
            Check("retain drop", True, "0.3 points on 999 images, at most 1 point asked"),
            Check("held-out model passes", True, "the held-out retrained model passes every check"),
            Check("controls fail", False, "HeadOnly passes the linear probe (invented)"),
            Check("membership", None, "the original model hardly memorises: validity 0.52 < 0.55"),
        ],
        verdict=Verdict(
            "forgotten",
            "GSLoRAPlusPlus brought the accuracy on eight from 99.0 % to 0.0 % (retrained 0.0 %, "
            "n = 111) and kept 97.8 % of 98.1 % on the rest.",
        ),
        sequence=[
            {"step": step, "request": name, "split": split, "accuracy": value, "n": 111}
            for step, name, cells in (
                (0, "", {"forget": 0.98, "retain": 0.981}),
                (1, "first", {"forget": 0.0, "retain": 0.979}),
                (2, "second", {"forget": 0.0, "retain": 0.978, "previous": 0.0}),
            )
            for split, value in cells.items()
        ],
        curves=curves(),
        class_accuracy={
            "original": list(kept), "unlearned": forgot, "retrained-1": list(forgot),
            "retrained-2": [value + 0.005 if value else 0.0 for value in forgot],
        },
        confusion={"original": before, "unlearned": spread, "retrained-1": spread[::-1]},
        examples=[
            {"kind": kind, "id": 987654 + index, "label": index, "image": picture(text, colour),
             "predictions": {"original": [index, 0.99], "unlearned": [other, 0.61],
                             "retrained-1": [other, 0.52], "HeadOnly": ["control-says", 0.5]}}
            for kind, index, other, text, colour in (
                ("forgotten", 3, 5, "3", (30, 40, 120)), ("forgotten", 8, 9, "8", (120, 30, 60)),
                ("forgotten", 3, 2, "3", (20, 90, 60)),
                ("most_changed_retained", 5, 9, "5", (90, 60, 20)),
                ("most_changed_retained", 2, 2, "2", (60, 60, 60)),
            )
        ],
        not_measured=["per-sample membership attack (U-LiRA): it needs sixteen retrained models"],
        not_claimed=["No certificate of deletion: the evidence is bounded by the attacks we ran."],
        provenance={"mmforget": "0.0", "seeds": {"audit": 0}, "command": "mmforget quickstart"},
        tuning="One configuration, chosen on validation data.",
        warnings=["invented warning: two attack seeds only"],
    )  # fmt: skip


@pytest.fixture
def results() -> Results:
    """A fresh copy of the invented results."""
    return make()


@pytest.fixture
def failing(results: Results) -> Results:
    """The same, with a verdict that the audit cannot tell."""
    verdict = Verdict("not_discriminative", "the control HeadOnly passes every check.")
    return replace(results, verdict=verdict)
