"""What a multimodal audit says beside its numbers: data, gaps, warnings, origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mmforget.audit.multimodal_scene import BOTH, UNSPOKEN, MultimodalScene
from mmforget.audit.provenance import environment
from mmforget.audit.references import failed_rows, missing_references, untouched
from mmforget.audit.results import ModelEntry
from mmforget.audit.rows import Rows
from mmforget.data.questions import TEXT

NOT_CLAIMED = [
    "No certificate of deletion: the evidence is bounded by the questions and the attack that were "
    "run.",
    "An answer that says nothing is no proof that the weights know nothing: what is left inside is "
    "looked at by the likelihood of the true answer, by the original's last layer, and by "
    "relearning.",
    "Questions in all other words, languages and conversations were not asked.",
    "Whoever has the original weights has what was forgotten.",
]


def describe(scene: MultimodalScene) -> dict[str, Any]:
    """The section `data` of the results."""
    split, names = scene.split, scene.class_names
    return {
        "name": scene.data.dataset("test").name,
        "kind": "multimodal",
        "hash": split.data_hash,
        "split_hash": split.hash,
        "sizes": split.sizes(),
        "asked": {
            name: len(part.data) for name, part in scene.parts.items() if name not in UNSPOKEN
        },
        "class_names": list(names),
        "forget_classes": [names[index] for index in split.forget_classes],
        "previous_classes": [names[index] for index in split.previous_classes],
        "missing_classes": [names[index] for index in split.missing_classes],
        "forgotten_questions": list(scene.data.forgotten_kinds),
        "judge": type(scene.judge).__name__,
    }


def not_measured(scene: MultimodalScene, rows: Rows) -> list[str]:
    """What was left out, each with its reason."""
    missing = ["Sampled answers: all answers are greedy, so rarer ones were not heard"]
    missing += missing_references(scene)
    if not scene.retrained:
        missing.append("Forget quality: it compares truth ratios with those of a retrained model")
    if scene.wrong_losses(scene.original) is None:
        missing.append("Truth ratio and choice among answers: the data has no other answers")
    if not scene.settings.relearning.steps:
        missing.append("Relearning: not run")
    for name, what in (
        ("test_retain", "Safe answers (SARR): the data has no such question about the rest"),
        (f"test_{TEXT}_forgotten", "Questions without picture: the data has none"),
        (f"test_{BOTH}_forgotten", "Pictures with the name in the question: the data has none"),
        ("train_reworded", "Held-out wording: the data has none for the training pictures"),
    ):
        if not scene.has(name):
            missing.append(what)
    return missing + failed_rows(rows)


def warnings(scene: MultimodalScene, entries: Sequence[ModelEntry]) -> list[str]:
    """What a reader must know before the numbers."""
    found = untouched(entries)
    for split, part in scene.parts.items():
        if part.whole > len(part.data) and split not in UNSPOKEN:
            found.append(
                f"values on {split} come from {len(part.data)} of {part.whole} questions, drawn at "
                "random"
            )
    overlap = scene.data.overlap()
    if overlap.pairs:
        found.append(
            f"{overlap.pairs} training records are to be forgotten and retained at once: the same "
            "pictures and question"
        )
    if overlap.copies:
        found.append(f"{overlap.copies} pictures of the forget set are also in the retain set")
    few = [
        scene.class_names[index]
        for index in scene.forgotten_classes
        if scene.has("test_forgotten")
        and 0 < int((scene.parts["test_forgotten"].data.subjects == index).sum()) < 20
    ]
    if few:
        found.append(f"fewer than 20 unseen pictures of {', '.join(few)}: their values are rough")
    found.append(
        "one training seed: intervals are over questions only and understate the spread over seeds"
    )
    return found


def provenance(scene: MultimodalScene, seconds: float, command: str) -> dict[str, Any]:
    """Versions, hardware, duration, and all settings of the audit."""
    settings = asdict(scene.settings)
    settings.pop("tuning")
    device = scene.by_role("original")[0].model.device
    return environment(device, seconds, command) | {
        "audit_settings": settings,
        "request_hashes": list(scene.split.request_hashes),
    }
