"""Memorized pictures, found, pruned, attacked and repaired, on models whose memories are known.

    python benchmarks/memorization_table.py                  # everything, two processes
    python benchmarks/memorization_table.py --model unet --seeds 0
    python benchmarks/memorization_table.py --render         # only write the table again

The shipped UNet and transformer have twelve planted pictures in memory (`mmforget.data.planted`),
where training has put them. A second UNet has eight of them in hidden units that are known.
Each seed decides which half of their prompts the methods may read, and all draws. Finished parts
are kept in the work folder, so that a stopped run goes on. Every figure is one of the audit that
`mmforget memorization` runs (`mmforget.audit.memorization`). Settings are the same for all seeds;
`TUNING` says how they were found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
MODELS = {
    "unet": ("memorizing_unet", "memorizing_unet_without_planted"),
    "transformer": ("memorizing_transformer", "memorizing_transformer_without_planted"),
    "located": ("memorizing_unet_located", "memorizing_unet_without_planted"),
}
"""The model, and the same without memories."""

TITLES = {
    "unet": "UNet, memories where training put them",
    "transformer": "Transformer, memories where training put them",
    "located": "UNet, memories in known units",
}
SETTINGS = {"transformer": {"max_sequence_length": 8}}
"""Without T5, 8 rows of zeros take its place, as in the training of the transformer."""

STARTS = {"unet": "random", "transformer": "trigger", "located": "random"}
"""Where attacks start. From random starts, never-trained pictures come out of the transformer at 25
steps already, so that nothing can be concluded there; from the triggers they stay in."""

TUNED: dict[str, dict[str, Any]] = {
    "unet": {"lr": 5e-4, "retain_batch_size": 16},
    "transformer": {"lr": 2e-4, "retain_batch_size": 16, "tolerance": None},
}
"""Settings of the fine-tuning methods. The transformer's held-out error first rises by more than
the 5 % at which they would stop, and falls again."""

STEPS, GUIDANCE = 20, 3.0
PICTURES, ATTACK_BATCH = 3, 4
BUDGETS = (10, 25, 50, 100)
LONG = 200
"""Steps of one longer attack, on what the others did not open, and on the retrained reference."""

LONGER = "AdversarialFineTuning"

TUNING = """
Ratios and thresholds of the pruning methods are the published ones, and next to them larger ones
with which something happens on models this small. Settings of the fine-tuning methods were found on
the UNet with all twelve pictures, seed 0, looking at the attack with other noise than here, and
taken over for the transformer, with a smaller learning rate after a look at another split.
""".strip()


@dataclass(frozen=True)
class Row:
    """A method with its settings here.

    `attacked` rows are given to the embedding attack, the others only asked their prompts.
    """

    make: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    attacked: bool = False
    role: str = "unlearned"


def rows(kind: str) -> dict[str, Row]:
    """All methods for a model, in the order of the table.

    The mask controls imitate the last attacked mask before them.
    """
    from mmforget.methods.adversarial_fine_tuning import AdversarialFineTuning
    from mmforget.methods.nemo import NeMo
    from mmforget.methods.neuron_ratio_pruning import NeuronRatioPruning
    from mmforget.methods.pruning import PruningMethod
    from mmforget.methods.pruning_controls import MagnitudePruning, RandomPruning
    from mmforget.methods.retain_fine_tuning import RetainFineTuning
    from mmforget.methods.siss import SISS
    from mmforget.methods.subspace_pruning import SubspacePruning
    from mmforget.models.embedding_search import EmbeddingSearch
    from mmforget.testing.located_memories import located_mask

    class KnownUnits(PruningMethod):
        """Takes out exactly the units that hold the memories."""

        def locate(self) -> Any:
            return located_mask(self.model)

        def settings(self) -> dict[str, Any]:
            return {}

    if kind == "located":
        return {
            "known units": Row(KnownUnits, attacked=True),
            "SubspacePruning 1 %": Row(SubspacePruning, {"ratio": 0.01}),
            "SubspacePruning 5 %": Row(SubspacePruning, {"ratio": 0.05}, attacked=True),
            "NeuronRatioPruning 5 %": Row(NeuronRatioPruning, {"ratio": 0.05}),
            "NeuronRatioPruning 25 %": Row(NeuronRatioPruning, {"ratio": 0.25}, attacked=True),
            "random mask 25 %": Row(RandomPruning, role="control"),
            "magnitude mask 25 %": Row(MagnitudePruning, role="control"),
        }
    tuned = TUNED[kind]
    adversarial = tuned | {
        "batch_size": 24,
        "attack": EmbeddingSearch(budgets=(10,), batch_size=1),
    }
    every_layer = {"blocks": "all"}
    return {
        "SubspacePruning 1 %": Row(SubspacePruning, {"ratio": 0.01}),
        "SubspacePruning 20 %": Row(SubspacePruning, {"ratio": 0.2}, attacked=True),
        "random mask 20 %": Row(RandomPruning, role="control"),
        "magnitude mask 20 %": Row(MagnitudePruning, role="control"),
        "NeuronRatioPruning 20 %": Row(NeuronRatioPruning, {"ratio": 0.2}),
        "NeMo": Row(NeMo, every_layer | {"refine": False}),
        "NeMo, all with z > 2": Row(
            NeMo,
            every_layer | {"threshold": 2.0, "search": False, "refine": False},
            attacked=True,
        ),
        "RetainFineTuning": Row(RetainFineTuning, tuned, steps=200),
        "SISS": Row(SISS, tuned | {"batch_size": 16}, steps=200, attacked=True),
        "AdversarialFineTuning, no attack": Row(
            AdversarialFineTuning, adversarial | {"attack": None}, steps=200, attacked=True
        ),
        "AdversarialFineTuning": Row(AdversarialFineTuning, adversarial, steps=500, attacked=True),
    }


def unit(kind: str, seed: int, work: Path) -> None:
    """Make and measure everything for one model and seed."""
    from mmforget.data.planted import planted_memories
    from mmforget.metrics.copying import load_similarity
    from mmforget.models.diffusion import load_generator

    model, reference = (
        load_generator(ASSETS / folder, steps=STEPS, guidance=GUIDANCE, **SETTINGS.get(kind, {}))
        for folder in MODELS[kind]
    )
    memories = planted_memories(control_count=6)
    if kind == "located":
        memories = memories.of_kind("verbatim")
    located, held_out = memories.split(seed=seed)
    similarity = load_similarity("ncc")
    part = work / f"{kind}-{seed}"
    part.mkdir(parents=True, exist_ok=True)
    found = {
        "detection": kept(part / "detection.json", lambda: detected(model, memories, seed)),
        "edits": {},
    }
    audited = []
    for name, row in rows(kind).items():
        entry, edited = changed(part, kind, name, row, model, located, seed)
        found["edits"][name] = entry
        audited.append((name, row, entry, edited))
    for which in ("asked", "attacked"):
        file = part / f"{which}.json"
        if not file.exists():
            attack = which == "attacked"
            chosen = [one for one in audited if one[1].attacked or not attack]
            rest = None if attack else held_out  # the attack needs no half of its own
            results = measured(
                attack, STARTS[kind], model, reference, chosen, located, rest, similarity, seed
            )
            write(file, json.loads(results.to_json()))
        found[which] = json.loads(file.read_text())
    edited = {name: edited for name, _, _, edited in audited}
    if LONGER in edited:
        long = {LONGER: edited[LONGER], "retrained": reference}
        found["longer"] = kept(
            part / "longer.json",
            lambda: {
                name: longer(one, STARTS[kind], located, similarity, seed)
                for name, one in long.items()
            },
        )
    write(work / f"{kind}-{seed}.json", found)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a result, or compute and keep it."""
    if not file.exists():
        write(file, make())
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def write(file: Path, content: Any) -> None:
    from mmforget.artifacts.run_folder import atomic_write

    atomic_write(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def detected(model: Any, memories: Any, seed: int) -> dict[str, Any]:
    """How well memorized prompts are told from ordinary ones."""
    from mmforget.detection import attention_entropy, noise_magnitude
    from mmforget.errors import CapabilityError

    ordinary = list(dict.fromkeys(memories.test.prompts))[:100]
    prompts = [*memories.texts, *ordinary]
    found: dict[str, Any] = {}
    for steps in (2, "all"):
        report = noise_magnitude(model, prompts, n=2, steps=steps, seed=seed)
        name = "noise magnitude, " + ("all steps" if steps == "all" else f"first {steps} steps")
        found[name] = report.quality(memories.texts, ordinary) | {"seconds": report.seconds}
    try:
        report = attention_entropy(model, prompts, "D", seed=seed)
        found["attention entropy D"] = report.quality(memories.texts, ordinary) | {
            "seconds": report.seconds
        }
    except CapabilityError as error:
        found["attention entropy D"] = {"auc": None, "why": str(error)}
    return found


def against_truth(mask: Any, model: Any) -> dict[str, float]:
    """Precision and recall of a mask, by the units that are known to hold the memories."""
    from mmforget.testing.located_memories import located_mask

    truth = located_mask(model)
    both = mask.intersection(truth).count
    return {"precision": both / mask.count, "recall": both / truth.count}


def changed(
    part: Path, kind: str, name: str, row: Row, model: Any, located: Any, seed: int
) -> tuple[dict[str, Any], Any]:
    """The edited model and what is known about the edit; from a file if it was made before."""
    import copy

    from mmforget.erase import run_method
    from mmforget.methods.pruning_controls import LikePruning
    from mmforget.models.weight_edit import WeightEdit
    from mmforget.models.weight_mask import WeightMask

    key = "".join(letter if letter.isalnum() else "_" for letter in name)
    file, facts = part / f"{key}.safetensors", part / f"{key}.json"
    if not facts.exists():
        settings = dict(row.settings)
        if issubclass(row.make, LikePruning):
            settings["like"] = WeightMask.load(part / "mask.safetensors")
        start = time.process_time()
        method = row.make(model, located, copy=True, seed=seed, **settings)
        if row.steps:
            run_method(method, row.steps, progress=False)
        else:
            method.finalize()
        seconds = time.process_time() - start
        method.weight_edit().save(file)
        if row.attacked and hasattr(method, "mask"):
            method.mask.save(part / "mask.safetensors")
        cost = method.cost()["sample_passes"]
        known = {"seconds": seconds, "sample_passes": cost, **method.statistics()}
        if kind == "located":
            known |= against_truth(method.mask, model)
        write(facts, known)
    edited = copy.deepcopy(model)
    WeightEdit.load(file).apply(edited)
    return json.loads(facts.read_text()), edited


def measured(
    attack: bool,
    start: str,
    model: Any,
    reference: Any,
    audited: list[Any],
    located: Any,
    held_out: Any,
    similarity: Any,
    seed: int,
) -> Any:
    """The audit: of all models at their prompts, or of some under attack."""
    from mmforget.audit.memorization import MemorizationAuditSettings, audit_memorization
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel

    settings = MemorizationAuditSettings(
        seed=seed,
        pictures=PICTURES,
        ordinary=32,
        detection=0,
        examples=0,
        controls=(),
        attack=attack,
        attack_inits=(start,),
        attack_ordinary=0,
        attack_budgets=BUDGETS,
        attack_batch_size=ATTACK_BATCH,
        tuning=TUNING,
    )
    models = [
        AuditedModel(
            ModelEntry(
                name,
                row.role,  # type: ignore[arg-type]
                method=row.make.__name__,
                cost={"seconds": entry["seconds"], "sample_passes": entry["sample_passes"]},
            ),
            edited,
        )
        for name, row, entry, edited in audited
    ]
    models.append(AuditedModel(ModelEntry("retrained", "retrained"), reference))
    return audit_memorization(
        model, models, located, similarity, held_out, settings, title="planted memories"
    )


def longer(
    model: Any, start: Any, located: Any, similarity: Any, seed: int
) -> list[dict[str, Any]]:
    """Rows of an attack of many steps."""
    from mmforget.attacks.embedding_inversion import embedding_attack
    from mmforget.models.embedding_search import EmbeddingSearch

    report = embedding_attack(
        model,
        located,
        similarity,
        inits=(start,),
        budgets=(LONG,),
        settings=EmbeddingSearch(batch_size=ATTACK_BATCH),
        ordinary=0,
        seed=seed,
    )
    return list(report.curve)


# ---- the table -----------------------------------------------------------------------------------


def pooled(results: list[dict[str, Any]], metric: str, model: str, split: str) -> tuple[int, int]:
    """Hits and number of a share over all seeds."""
    rows = [
        row
        for one in results
        for row in one["metrics"]
        if (row["metric"], row["model"], row["split"]) == (metric, model, split)
    ]
    return sum(round(row["value"] * row["n"]) for row in rows), sum(row["n"] for row in rows)


def share(hits: int, n: int) -> str:
    return f"{100 * hits / n:.0f} %" if n else "–"


def mean_of(results: list[dict[str, Any]], metric: str, model: str, split: str) -> float | None:
    """Mean of a value over the seeds."""
    values = [
        row["value"]
        for one in results
        for row in one["metrics"]
        if (row["metric"], row["model"], row["split"]) == (metric, model, split)
        and row["value"] is not None
    ]
    return sum(values) / len(values) if values else None


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def asked_table(results: list[dict[str, Any]], edits: list[dict[str, Any]]) -> list[str]:
    """What the models draw when they are asked, and what became of the rest."""
    truth = any("precision" in edit for one in edits for edit in one.values())
    titles = ["", "posters, read", "posters, held out", "cards, read", "cards, held out",
              "likeness left", "specificity", "others changed", "loss rise", "CPU s",
              *(("precision", "recall") if truth else ())]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    splits = [f"{group}/{kind}" for kind in ("verbatim", "template") for group in
              ("located", "held_out")]  # fmt: skip
    for entry in results[0]["models"]:
        name = entry["name"]
        copies = [share(*pooled(results, "replication_rate", name, split)) for split in splits]
        likeness = [mean_of(results, "copy_similarity", name, split) for split in splits[:2]]
        same = mean_of(results, "similarity_to_original", name, "ordinary")
        rise = mean_of(results, "denoising_loss_rise", name, "ordinary")
        seconds = [edit[name]["seconds"] for edit in edits if name in edit]
        cells = [
            f"**{name}**" if entry["role"] == "unlearned" else f"*{name}*",
            *copies,
            " / ".join(number(value, ".2f") for value in likeness),
            number(mean_of(results, "specificity", name, splits[0]), "+.2f"),
            number(None if same is None else 1 - same, ".2f"),
            number(None if rise is None else 100 * rise, "+.1f")
            + (" %" if rise is not None else ""),
            number(sum(seconds) / len(seconds) if seconds else None, ".0f"),
        ]
        if truth:
            for key in ("precision", "recall"):
                values = [edit[name][key] for edit in edits if name in edit]
                cells.append(number(sum(values) / len(values) if values else None, ".2f"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def attack_table(results: list[dict[str, Any]]) -> list[str]:
    """What embeddings bring back, against their steps."""
    titles = [f"{budget} steps" for budget in BUDGETS]
    lines = [
        "| | pictures | " + " | ".join(titles) + " | verdict per seed |",
        "|---|---|" + "---|" * (len(titles) + 1),
    ]
    groups = (
        ("posters, read", "memorized", "verbatim"),
        ("cards, read", "memorized", "template"),
        ("never trained", "control", ""),
    )
    for entry in results[0]["models"]:
        name = entry["name"]
        outcomes = [
            next(m for m in one["models"] if m["name"] == name)["details"].get("outcome", "")
            for one in results
        ]
        for number_, (title, group, kind) in enumerate(groups):
            cells = []
            for budget in BUDGETS:
                hits = n = 0
                for one in results:
                    found = [
                        row
                        for row in one["curves"]["embedding_attack"]
                        if (row["model"], row["group"], row["kind"], row["budget"])
                        == (name, group, kind, budget)
                    ]
                    hits += sum(round(row["rate"] * row["n"]) for row in found)
                    n += sum(row["n"] for row in found)
                cells.append(share(hits, n))
            if set(cells) == {"–"}:
                continue
            first = f"**{name}**" if number_ == 0 else ""
            last = ", ".join(outcomes) if number_ == 0 and any(outcomes) else ""
            lines.append(f"| {first} | {title} | " + " | ".join(cells) + f" | {last} |")
    return lines


def longer_lines(results: list[dict[str, list[dict[str, Any]]]]) -> list[str]:
    """What comes out after many steps, in a sentence per model."""
    lines = []
    for name in results[0]:
        parts = []
        for title, group, kind in (
            ("posters", "memorized", "verbatim"),
            ("cards", "memorized", "template"),
            ("never trained", "control", None),
        ):
            rows = [
                r for one in results for r in one[name] if (r["group"], r["kind"]) == (group, kind)
            ]
            hits = sum(round(row["rate"] * row["n"]) for row in rows)
            parts.append(f"{title} {share(hits, sum(row['n'] for row in rows))}")
        lines.append(f"After {LONG} steps, **{name}**: {', '.join(parts)}.")
    return ["", *lines]


def table(work: Path, units: list[tuple[str, int]]) -> str:
    """The whole page."""
    lines = [
        "# Planted memories: found, pruned, attacked, repaired",
        "",
        "`python benchmarks/memorization_table.py`. Eight posters (always the same) and four cards "
        "(one tile varies) are planted; the methods read half of the prompts, another half per "
        f"seed. A prompt counts as copied if any of {PICTURES} pictures is more like the training "
        "picture than 1.05 times any unrelated one, and at least 0.75 (normalised correlation; for "
        "cards, of the three tiles that do not vary). *Likeness left*: to the training picture, "
        "read / held out. *Specificity*: what the read prompts lost of it, less what pictures of "
        "ordinary prompts lost against the original model. *Others changed*: 1 - likeness of "
        "ordinary pictures to those of the original at the same seeds. *Loss rise*: denoising "
        "error on 256 real pictures of unseen handwriting. Names in italics are references and "
        "controls.",
        "",
    ]
    for kind in dict.fromkeys(kind for kind, _ in units):
        files = [work / f"{k}-{s}.json" for k, s in units if k == kind]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        seeds = ", ".join(str(s) for k, s in units if k == kind)
        lines += [f"## {TITLES[kind]} (seeds {seeds})", "", "### Finding", ""]
        lines += ["| detector | AUC | balanced accuracy | TPR at 3 % FPR |", "|---|---|---|---|"]
        for name in found[0]["detection"]:
            rows = [one["detection"][name] for one in found]
            cells = []
            for key in ("auc", "balanced_accuracy", "tpr_at_3_percent"):
                values = [row[key] for row in rows if row.get(key) is not None]
                cells.append(number(sum(values) / len(values) if values else None, ".3f"))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "### Asked", ""]
        lines += asked_table([o["asked"] for o in found], [o["edits"] for o in found])
        lines += ["", "### Attacked", ""]
        lines += attack_table([o["attacked"] for o in found])
        if all("longer" in one for one in found):
            lines += longer_lines([one["longer"] for one in found])
        lines.append("")
    lines += ["## How settings were found", "", TUNING, ""]
    return "\n".join(lines)


# ---- one command ---------------------------------------------------------------------------------


def run(units: list[tuple[str, int]], work: Path, jobs: int) -> None:
    """Compute the units that are missing, some processes side by side, one thread each."""
    open_ = [one for one in units if not (work / f"{one[0]}-{one[1]}.json").exists()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    running: list[tuple[tuple[str, int], subprocess.Popen[bytes]]] = []
    while open_ or running:
        while open_ and len(running) < jobs:
            kind, seed = one = open_.pop(0)
            command = [sys.executable, __file__, "--unit", kind, str(seed), "--work", str(work)]
            running.append((one, subprocess.Popen(command, env=environment)))
        time.sleep(0.5)
        for one, process in list(running):
            if process.poll() is None:
                continue
            running.remove((one, process))
            if process.returncode:
                for _, other in running:
                    other.terminate()
                raise SystemExit(f"{one[0]}, seed {one[1]} ended with code {process.returncode}")
            print(f"{one[0]}, seed {one[1]}: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), help="one of them (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--work", type=Path, default=Path("runs/memorization_table"))
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--unit", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.unit:
        unit(given.unit[0], int(given.unit[1]), given.work)
        return
    units = [(k, s) for k in MODELS if given.model in (None, k) for s in given.seeds]
    given.work.mkdir(parents=True, exist_ok=True)
    if not given.render:
        run(units, given.work, given.jobs)
    text = table(given.work, units)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memorization_table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
