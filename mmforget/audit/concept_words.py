"""What an audit of a generator says beside its numbers: data, examples, gaps, warnings, origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmforget.audit.concept_attacks import ATTACKS
from mmforget.audit.concept_pictures import facts_in
from mmforget.audit.drawing import IDENTITY, plan_hash, strip
from mmforget.audit.provenance import environment
from mmforget.audit.results import ModelEntry
from mmforget.audit.rows import Rows
from mmforget.request import ForgetRequest

if TYPE_CHECKING:
    from mmforget.audit.concepts import ConceptScene

NEGATIVE_PROMPT = "negative prompt"
CONTROLS = {"negative_prompt": NEGATIVE_PROMPT, "identity": IDENTITY}

NOT_CLAIMED = [
    "No certificate of deletion: the evidence is bounded by the prompts, seeds and attacks that "
    "were run.",
    "A rate of 0 % means that the judge saw nothing in so many pictures; its interval says how "
    "much that can be.",
    "Whoever has the original weights has what was erased.",
]


def describe(scene: ConceptScene, judged_by_clip: bool) -> dict[str, Any]:
    """The section `data` of the results."""
    judge = scene.judge
    sizes = {cell.split: len(cell.rows) for cell in scene.cells}
    facts: dict[str, Any] = {"judge": "none"}
    if judge is not None:
        facts = {
            "judge": "zero-shot CLIP" if judged_by_clip else type(judge).__name__,
            "judge_accuracy_on_real_pictures": dict(judge.accuracy) or "unknown",
        }
    digest = plan_hash([(cell.split, cell.rows) for cell in scene.cells], scene.sampling)
    return {
        "name": "pictures that the models draw",
        "kind": "generator",
        "hash": digest,
        "split_hash": ForgetRequest(concepts=scene.concepts).hash,
        "sizes": sizes,
        "class_names": [],
        "sampling": scene.sampling,
        **facts,
    }


def examples(scene: ConceptScene) -> list[dict[str, Any]]:
    """Rows of pictures, the same seeds for all models but the one with other seeds."""
    count = scene.settings.examples
    if not count:
        return []
    shown = [one.entry.name for one in scene.models if one.entry.name != IDENTITY]
    found = []
    for cell in scene.cells:
        kind = {"synonym": "target", "together": "target"}.get(cell.role, cell.role)
        start = scene.places[cell.split].start
        prompts = [prompt for prompt, _ in cell.rows]
        # one row per cell; the pictures of different prompts would need a caption each
        chosen = [i for i, prompt in enumerate(prompts) if prompt == prompts[0]][:count]
        if cell.others or len(chosen) < count:
            chosen = list(range(min(count, len(prompts))))
        label = list(dict.fromkeys(prompts[i] for i in chosen))
        found.append(
            {
                "kind": kind,
                "prompt": " · ".join(label),
                "count": len(chosen),
                "images": {
                    name: strip(scene.pictures[name][[start + index for index in chosen]])
                    for name in shown
                },
            }
        )
    return found


def not_measured(scene: ConceptScene, rows: Rows, judged_by_clip: bool) -> list[str]:
    """What was left out, each with its reason."""
    missing = []
    if scene.judge is None:
        missing.append("Rates: neither a judge nor a CLIP model was given, so nobody looked")
    if not any(concept.preserve for concept in scene.concepts):
        missing.append("Preserved concepts: none were named, so damage to the rest is unknown")
    if not any(concept.synonyms for concept in scene.concepts):
        missing.append("Synonyms: none were named")
    if scene.judge is not None and not any(cell.others for cell in scene.cells):
        missing.append("The other facts of prompts that name the target: no sentence for them")
    if scene.clip is None:
        missing.append("CLIP score and kernel distance: no CLIP model was given")
    if scene.judge is not None:
        left = [name for name in ATTACKS if name not in scene.settings.attacks]
        if left:
            missing.append(f"Attacks that were not run: {', '.join(left)}")
    else:
        missing.append("Attacks: they need a judge")
    if judged_by_clip:
        missing.append("Accuracy of the judge on real pictures: unknown for zero-shot CLIP")
    for name, control in CONTROLS.items():
        if control not in [one.entry.name for one in scene.models]:
            missing.append(f"Control '{name}': not run")
    failed = sum(bool(row.error) for row in rows.rows.values())
    if failed:
        missing.append(f"{failed} measurements failed; each is a row with its error")
    return missing


def warnings(scene: ConceptScene, rows: Rows, entries: Sequence[ModelEntry]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    first = next(entry for entry in entries if entry.role == "original")
    for entry in entries:
        if entry.role == "unlearned" and entry.hash == first.hash:
            model = next(one.model for one in scene.models if one.entry.name == entry.name)
            if model.guider is None:
                found.append(f"'{entry.name}' has exactly the weights of the original model")
    for concept in scene.concepts:
        split = f"target/{concept.target}"
        rate = rows.value("target_rate", first.name, split)
        if rate is not None and rate < scene.settings.min_original_rate:
            found.append(
                f"concept not represented: the original model shows '{concept.target}' in only "
                f"{100 * rate:.1f} % of its pictures, so there is little to erase"
            )
        for kept in concept.contained():
            found.append(f"'{kept}' is preserved, but contains an erased word")
    if scene.judge is not None:
        for concept in scene.concepts:
            factors = {f for word in concept.words for f in facts_in(scene.judge, word)}
            for factor in sorted(factors):
                accuracy = scene.judge.accuracy.get(factor)
                if accuracy is not None and accuracy < scene.settings.min_judge_accuracy:
                    found.append(
                        f"the judge reads '{factor}' in only {100 * accuracy:.1f} % of real "
                        "pictures"
                    )
    found.append("one erasure seed: intervals are over pictures only")
    return found


def provenance(scene: ConceptScene, seconds: float, command: str) -> dict[str, Any]:
    """Versions, hardware, duration, and all settings of the audit."""
    settings = {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(scene.settings).items()
    }
    device = next(scene.original.model.network.parameters()).device
    return environment(device, seconds, command) | {
        "audit_settings": {k: v for k, v in settings.items() if k != "tuning"}
    }
