"""What an audit of generators says beside its numbers: data, pictures, gaps, warnings, origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmforget.audit.concept_pictures import known_facts
from mmforget.audit.drawing import as_bytes, strip
from mmforget.audit.generator_attacks import ATTACKS, Recovery
from mmforget.audit.provenance import environment
from mmforget.audit.results import ModelEntry
from mmforget.audit.rows import Rows
from mmforget.request import ForgetRequest

if TYPE_CHECKING:
    from mmforget.audit.generators import GANScene

NOT_CLAIMED = [
    "No certificate of deletion: the evidence is bounded by the latents and attacks that were run.",
    "A rate of 0 % means that the judge saw nothing in so many pictures; its interval says how "
    "much that can be.",
    "A generator is smooth: some search brings almost anything out of it, also what it was never "
    "taught. Rates under attack mean something only beside those of a control.",
    "Whoever has the original weights has what was erased.",
]


def describe(scene: GANScene) -> dict[str, Any]:
    """The section `data` of the results."""
    model: Any = scene.original.model
    latents = {
        "prior": model.prior,
        "size": model.latent_size,
        "seed": scene.settings.seed,
        "pictures": scene.settings.pictures,
    }
    sizes = {"native": scene.settings.pictures, "clear": int(scene.clear.sum())}
    sizes |= {f"bearing/{target}": int(mask.sum()) for target, mask in scene.bearing.items()}
    sizes |= {f"edited/{target}": len(rows) for target, rows in scene.edited_rows.items()}
    facts: dict[str, Any] = {
        "name": "pictures that the models draw",
        "kind": "gan",
        "hash": hashlib.sha256(json.dumps(latents, sort_keys=True).encode()).hexdigest(),
        "split_hash": ForgetRequest(concepts=scene.concepts).hash,
        "sizes": sizes,
        "class_names": list(model.class_names),
        "latents": latents,
        "judge": type(scene.judge).__name__,
        "judge_accuracy_on_real_pictures": dict(scene.judge.accuracy) or "unknown",
        "guide": "none",
    }
    if scene.guide is not None:
        facts["guide"] = scene.guide.describe()
        facts["guide_is_judge"] = scene.guide_is_judge
        facts["agreement_of_guide_and_judge"] = scene.agreement
    if scene.mappers:
        facts["edits"] = scene.mappers
    return facts


def examples(scene: GANScene, recoveries: Sequence[Recovery]) -> list[dict[str, Any]]:
    """Rows of pictures at the same latents: what showed a concept, what did not, and attacks."""
    count = scene.settings.examples
    if not count:
        return []
    aligned = [scene.original.entry.name, *(one.entry.name for one in scene.tuned)]
    found = []
    for target, mask in scene.bearing.items():
        found.append(_strips(scene, aligned, "bearing", f"“{target}” before", mask, count))
    found.append(_strips(scene, aligned, "clear", "everything else", scene.clear, count))
    for target, rows in scene.edited_rows.items():
        found.append(
            {
                "kind": "edited",
                "prompt": f"edited towards “{target}”",
                "count": min(count, len(rows)),
                "images": {name: strip(scene.edited[name, target][:count]) for name in aligned},
            }
        )
    others = [one.entry.name for one in scene.models if one.entry.name not in aligned]
    everything = torch.ones(scene.settings.pictures, dtype=torch.bool)
    found.append(
        _strips(scene, [aligned[0], *others], "native", "the first pictures", everything, count)
    )
    for attack in scene.settings.attacks:
        for concept in scene.concepts:
            after = {
                one.model: one.report.pictures[:count]
                for one in recoveries
                if (one.attack, one.concept, one.proxy) == (attack, concept.target, False)
                and one.report.pictures is not None
                and len(one.report.pictures)
            }
            if after:
                found.append(
                    {
                        "kind": "after_attack",
                        "prompt": f"{attack.replace('_', ' ')}, “{concept.target}”",
                        "count": max(map(len, after.values())),
                        "images": {name: strip(as_bytes(shown)) for name, shown in after.items()},
                    }
                )
    return [one for one in found if one["count"]]


def _strips(
    scene: GANScene, names: Sequence[str], kind: str, text: str, mask: Tensor, count: int
) -> dict[str, Any]:
    rows = mask.nonzero()[:count, 0]
    shown = {name: strip(scene.pictures[name][rows]) for name in names} if len(rows) else {}
    return {"kind": kind, "prompt": text, "count": len(rows), "images": shown}


def not_measured(scene: GANScene, rows: Rows, recoveries: Sequence[Recovery]) -> list[str]:
    """What was left out, each with its reason."""
    missing = []
    if scene.guide is None:
        missing.append(
            "Edits towards the concept, attacks, and whether guide and judge agree: no guide was "
            "given"
        )
    elif not scene.settings.edits:
        missing.append("Edits towards the concept: left out by the settings")
    left = [name for name in ATTACKS if not any(one.attack == name for one in recoveries)]
    if left:
        missing.append(f"Attacks that were not run: {', '.join(left)}")
    if not scene.by_role("retrained"):
        missing.append("A generator trained without the concept, the best control: none was given")
        if recoveries and not any(one.proxy for one in recoveries):
            missing.append("A proxy control of the attacks: no concept for it was given")
    if scene.real is None:
        missing.append("Distance to real pictures: none were given")
    if not scene.judge.accuracy:
        missing.append("Accuracy of the judge on real pictures: unknown")
    failed = sum(bool(row.error) for row in rows.rows.values())
    if failed:
        missing.append(f"{failed} measurements failed; each is a row with its error")
    return missing


def warnings(scene: GANScene, rows: Rows, entries: Sequence[ModelEntry]) -> list[str]:
    """What a reader must know before the numbers."""
    from mmforget.audit.generators import is_filter

    found = []
    first = next(entry for entry in entries if entry.role == "original")
    filters = [one.entry.name for one in scene.models if is_filter(one)]
    for entry in entries:
        if entry.role != "unlearned":
            continue
        if entry.name in filters:
            found.append(
                f"'{entry.name}' is a filter: its weights are unchanged, and nothing was forgotten"
            )
        elif entry.hash == first.hash:
            found.append(f"'{entry.name}' has exactly the weights of the original model")
    if scene.guide_is_judge:
        found.append(
            "judge and guide are the same CLIP model: an edit that only fools this model passes"
        )
    if scene.settings.proxy:
        facts = known_facts(scene.judge, "audit.proxy", [scene.settings.proxy])
        share = float(scene.first.shows(facts).double().mean())
        if share >= scene.settings.min_original_rate:
            found.append(
                f"the proxy control '{scene.settings.proxy}' is drawn in {100 * share:.1f} % of "
                "the original's pictures, so that it is none: name what it never draws"
            )
    for concept in scene.concepts:
        for kept in concept.contained():
            found.append(f"'{kept}' is preserved, but contains an erased word")
    found.append("one seed of the method: intervals are over latents only")
    return found


def provenance(scene: GANScene, seconds: float, command: str) -> dict[str, Any]:
    """Versions, hardware, duration, and all settings of the audit."""
    settings = {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(scene.settings).items()
    }
    return environment(scene.device, seconds, command) | {
        "audit_settings": {k: v for k, v in settings.items() if k != "tuning"}
    }
