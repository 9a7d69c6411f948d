"""What a memorization audit says beside its numbers: data, pictures, curves, gaps, origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmforget.audit.drawing import IDENTITY, as_bytes, plan_hash, strip
from mmforget.audit.memorization_attack import AttackFinding
from mmforget.audit.memorization_verdict import unreliable
from mmforget.audit.provenance import environment
from mmforget.audit.results import ModelEntry
from mmforget.audit.rows import Rows

if TYPE_CHECKING:
    from mmforget.audit.memorization import MemorizationScene

NOT_CLAIMED = [
    "No certificate of deletion: the evidence is bounded by the prompts, seeds and attack steps "
    "that were run.",
    "A rate of 0 % is one of so many prompts; its interval says how much that can be.",
    "Memories that nobody listed were not looked for.",
    "Whoever has the original weights has the pictures.",
]
REMOVED = (
    "“Removed” means that an embedding search of the stated length finds these pictures no more "
    "easily than pictures that nobody was trained on. Longer searches were not tried."
)


def not_claimed(attacked: Mapping[str, AttackFinding]) -> list[str]:
    """What the report does not claim."""
    return [*NOT_CLAIMED, *([REMOVED] if attacked else [])]


def describe(scene: MemorizationScene) -> dict[str, Any]:
    """The section `data` of the results."""
    parts = [*((part.split, part.rows) for part in scene.parts), ("ordinary", scene.ordinary)]
    return {
        "name": scene.memorized.source or "memorized prompts",
        "kind": "memorization",
        "hash": plan_hash(parts, scene.sampling),
        "split_hash": scene.memorized.hash,
        "sizes": {split: len(rows) for split, rows in parts},
        "prompts": {part.split: len(part.memorized) for part in scene.parts},
        "class_names": [],
        "sampling": scene.sampling,
        "similarity": scene.similarity.protocol(),
        "thresholds": {
            part.split: [round(float(value), 4) for value in scene.thresholds[part.split]]
            for part in scene.parts
        },
        "background": len(scene.background),
        "coverage": str(scene.memorized.coverage),
        "controls": 0 if scene.memorized.controls is None else len(scene.memorized.controls),
    }


# ---- pictures ------------------------------------------------------------------------------------


def examples(
    scene: MemorizationScene, attacked: Mapping[str, AttackFinding]
) -> list[dict[str, Any]]:
    """Rows of pictures: the training picture, then every model at the same seeds."""
    if not scene.settings.examples:
        return []
    names = [one.entry.name for one in scene.models if one.entry.name != IDENTITY]
    count = min(scene.settings.example_pictures, scene.settings.pictures)
    found = []
    for part in scene.parts:
        for row in scene.shown_prompts(part):
            one, start = part.memorized.prompts[row], scene.places[part.split].start
            first = start + row * scene.settings.pictures
            after = {
                name: finding.pictures[one.prompt]
                for name, finding in attacked.items()
                if one.prompt in finding.pictures and name != scene.original.entry.name
            }
            found.append(
                {
                    "kind": part.split,
                    "prompt": one.prompt,
                    "count": count,
                    "training": strip(as_bytes(part.memorized.images[one.images[0]][None])),
                    "images": {
                        name: strip(scene.pictures[name][first : first + count]) for name in names
                    },
                    "attacked": after,
                }
            )
    place = scene.places["ordinary"].start
    chosen = list(dict.fromkeys(prompt for prompt, _ in scene.ordinary))[: scene.settings.examples]
    for prompt in chosen:
        own = [place + i for i, (text, _) in enumerate(scene.ordinary) if text == prompt][:count]
        found.append(
            {
                "kind": "ordinary",
                "prompt": prompt,
                "count": len(own),
                "images": {name: strip(scene.pictures[name][own]) for name in names},
            }
        )
    return found


def curves(
    scene: MemorizationScene, attacked: Mapping[str, AttackFinding]
) -> dict[str, list[dict[str, Any]]]:
    """What the attack brings back after how many steps; no picture by itself."""
    rows = [
        {
            "model": name,
            "group": row["group"],
            "kind": row.get("kind") or "",
            "init": row["init"],
            "budget": row["budget"],
            "rate": row.get("rate"),
            "mean_similarity": row.get("mean_similarity"),
            "n": row["n"],
        }
        for name, finding in attacked.items()
        for row in finding.curve
    ]
    return {"embedding_attack": rows} if rows else {}


# ---- gaps ----------------------------------------------------------------------------------------


def not_measured(
    scene: MemorizationScene, rows: Rows, attacked: Mapping[str, AttackFinding]
) -> list[str]:
    """What was left out, each with its reason."""
    missing = []
    if not attacked:
        missing.append(
            "The embedding attack and its controls: not run, so that no memory can be called "
            "removed"
        )
    elif scene.memorized.controls is None or not len(scene.memorized.controls):
        missing.append(
            "Attack on pictures that nobody was trained on: none were given, so that no memory can "
            "be called removed"
        )
    if scene.held_out is None:
        missing.append("Held-out memorized prompts: the method has read all that were given")
    if not scene.masks and any(
        "density" in one.entry.details for one in scene.by_role("unlearned")
    ):
        missing.append("Masks of the same density that locate nothing: not tried")
    if scene.memorized.test.images is None:
        missing.append("Denoising loss and kernel distance: no ordinary test pictures were given")
    if scene.clip is None:
        missing.append("CLIP score of ordinary prompts: no CLIP model was given")
    if not scene.settings.detection:
        missing.append("Detection by the strength of the text: left out")
    without = sum(not one.images for part in scene.parts for one in part.memorized.prompts)
    if without:
        missing.append(f"Copies at {without} prompts: their training pictures are not at hand")
    failed = sum(bool(row.error) for row in rows.rows.values())
    if failed:
        missing.append(f"{failed} measurements failed; each is a row with its error")
    return missing


def warnings(
    scene: MemorizationScene,
    rows: Rows,
    attacked: Mapping[str, AttackFinding],
    entries: Sequence[ModelEntry],
) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    first = next(entry for entry in entries if entry.role == "original")
    for entry in entries:
        if entry.role == "unlearned" and entry.hash == first.hash:
            found.append(f"'{entry.name}' has exactly the weights of the original model")
    for part in scene.parts:
        if unreliable(scene, part):
            found.append(f"unreliable metric for {part.split}: {unreliable(scene, part)}")
    coverage = scene.memorized.coverage
    if coverage is not None and coverage.usable < coverage.listed:
        found.append(f"incomplete list of memories: {coverage}")
    several = [
        one.prompt for part in scene.parts for one in part.memorized.prompts if len(one.images) > 1
    ]
    if several:
        found.append(
            f"{len(several)} prompts have several training pictures; the most similar one counts, "
            "and of their thresholds the highest"
        )
    for name, finding in attacked.items():
        if finding.error:
            found.append(f"the attack on '{name}' failed: {finding.error}")
        found += [f"attack on '{name}': {note}" for note in finding.notes]
    found.append("one seed of the method: intervals are over prompts and pictures only")
    return found


def provenance(scene: MemorizationScene, seconds: float, command: str) -> dict[str, Any]:
    """Versions, hardware, duration, and all settings of the audit."""
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(scene.settings).items()
    }
    device = next(scene.original.model.parameters()).device
    return environment(device, seconds, command) | {
        "audit_settings": {key: value for key, value in settings.items() if key != "tuning"}
    }
