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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmforget.artifacts.run_folder import atomic_write
from mmforget.attacks.concept_inversion import inversion_attack
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
from mmforget.erase import run_method
from mmforget.methods.concept_ablation import ConceptAblation
from mmforget.methods.concept_salun import ConceptSalUn
from mmforget.methods.esd import ESD
from mmforget.methods.rece import RECE
from mmforget.methods.sld import SLD
from mmforget.methods.uce import UCE
from mmforget.metrics.distribution import KernelDistance
from mmforget.metrics.judge import load_judge
from mmforget.metrics.perceptual import PairedChange
from mmforget.metrics.vacuous import noise_threshold, vacuous
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator, load_generator

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
MODELS = {"unet": "diffusion_unet", "transformer": "diffusion_transformer"}
STEPS, GUIDANCE, COMBINATIONS, TEMPLATED = 12, 3.0, 3, 6
PICTURES_SEED, REFERENCE_SEED = 1000, 2000
"""Pictures of the evaluation come from seeds that no tuning has looked at."""

TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}", "a drawing of a {}", "an image of a {}")
"""What the methods are given. The evaluation uses the sentences that suit the factor."""

OTHER_DIGITS = tuple(digit for digit in DIGITS if digit != "seven")
OTHER_INKS = tuple(ink for ink in INKS if ink != "red")
CONCEPTS = {
    "seven": ConceptSpec(
        "seven",
        synonyms=(DIGIT_SYNONYMS["seven"],),
        anchor="",
        preserve=(*OTHER_DIGITS, *INKS),
        templates=TEMPLATES,
    ),
    "red": ConceptSpec(
        "red",
        synonyms=(INK_SYNONYMS["red"],),
        anchor="",
        preserve=(*OTHER_INKS, *DIGITS),
        templates=TEMPLATES,
    ),
}
FACTOR = {"seven": "digit", "red": "ink"}
SENTENCES = {"seven": DIGIT_TEMPLATES, "red": INK_TEMPLATES}


@dataclass(frozen=True)
class Row:
    """A method with the settings and optimizer steps of this benchmark.

    `own` are settings for one concept only; `anchored` gives it another concept as its anchor.
    """

    make: Callable[..., Any]
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    anchored: bool = False


LAST = {"scope": "last", "preserve_scale": 1.0}
BANK = {
    "batch_size": 6,
    "retain_batch_size": 10,
    "trajectories": 8,
    "retain_trajectories": 30,
    "steps": 12,
}
GENTLE = {
    "eta": 0.5,
    "batch_size": 8,
    "retain_batch_size": 32,
    "retain_weight": 4.0,
    "trajectories": 4,
    "retain_trajectories": 3,
    "steps": 12,
}
MADE = {
    "batch_size": 8,
    "retain_batch_size": 8,
    "pictures": 24,
    "retain_pictures": 30,
    "steps": 12,
    "guidance": 3.0,
}

ANCHORS = {"seven": "three", "red": "green"}

METHODS: dict[str, Row] = {
    "UCE": Row(UCE, own={"red": LAST}),
    "UCE defaults": Row(UCE),
    "UCE last": Row(UCE, 0, LAST),
    "RECE": Row(RECE, own={"red": LAST}),
    "ESD-x": Row(ESD, 200, GENTLE | {"weights": "x", "lr": 1e-3}),
    "ESD-LoRA": Row(ESD, 200, GENTLE | {"weights": "x", "lora_rank": 4, "lr": 3e-3}),
    "ESD-x eta 1": Row(ESD, 120, BANK | {"weights": "x", "lr": 1e-3}),
    "ESD-x-strict eta 1": Row(ESD, 120, BANK | {"weights": "x-strict", "lr": 1e-3}),
    "ESD-u eta 1": Row(ESD, 120, BANK | {"weights": "u", "lr": 3e-4}),
    "Concept ablation": Row(ConceptAblation, 120, MADE | {"lr": 2e-3}, anchored=True),
    "SalUn": Row(ConceptSalUn, 100, MADE | {"lr": 1e-3}, anchored=True),
    "SLD strong": Row(SLD, 0, {"preset": "strong"}),
    "SLD max": Row(SLD, 0, {"preset": "max"}),
}
REFERENCES = ("original", "negative prompt", "retrained")
TUNING = (
    "found with the UNet, method seed 0 and pictures of another seed (500), one to eight settings "
    "per method; those of ESD-x, ESD-LoRA and UCE also after a first look at this table, which "
    "showed that UCE's defaults leave a third of 'red', and that ESD with eta 1 and a single "
    "retained trajectory takes 'pink' with it. UCE and RECE have their token scope chosen per "
    "concept, by the judge on those other pictures; the rows 'defaults' and 'last' show each "
    "choice alone. Used unchanged for all seeds"
)


def pairs(model: DiffusionGenerator, seed: int) -> Tensor:
    """Pictures of all pairs of digit and ink."""
    prompts = [f"a photo of a {ink} {digit}" for digit in DIGITS for ink in INKS]
    return model.generate(prompts, COMBINATIONS, seed)


def pictures(model: DiffusionGenerator, concept: ConceptSpec, seed: int) -> dict[str, Tensor]:
    """Everything that is judged: all pairs of digit and ink, and the templates of every word."""
    made = {"pairs": pairs(model, PICTURES_SEED + seed)}
    for word in concept.words:
        prompts = [sentence.format(word) for sentence in SENTENCES[concept.target]]
        made[word] = model.generate(prompts, TEMPLATED, PICTURES_SEED + seed)
    return made


def count(made: dict[str, Tensor], concept: ConceptSpec) -> dict[str, list[int]]:
    """Hits and trials per group: ``target``, ``synonym``, ``digit/three``, ``ink/blue``, ..."""
    judge, factor = load_judge(), FACTOR[concept.target]
    seen = {name: values.argmax(1) for name, values in judge(made["pairs"]).items()}
    facts = [(d, i) for d in DIGITS for i in INKS for _ in range(COMBINATIONS)]
    found: dict[str, list[int]] = {}

    def add(group: str, hit: bool) -> None:
        entry = found.setdefault(group, [0, 0])
        entry[0] += int(hit)
        entry[1] += 1

    for row, (digit, ink) in enumerate(facts):
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


# ---- one cell -----------------------------------------------------------------------------------


class NegativePrompt:
    """Guidance away from the concept's own words, which users try first."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words

    def prepare(self, model: DiffusionGenerator) -> PromptEmbedding:
        """The words, as one prompt."""
        return model.encode([" ".join(self.words)])

    def guide(
        self,
        step: int,
        conditional: Tensor,
        unconditional: Tensor,
        further: Tensor,
        scale: float,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Guidance with the prompt in the place of the empty one."""
        return further[0] + scale * (conditional - further[0])

    def to_dict(self) -> dict[str, Any]:
        """Settings."""
        return {"guidance": "NegativePrompt", "words": list(self.words)}


def make(name: str, kind: str, concept: ConceptSpec, seed: int) -> tuple[DiffusionGenerator, float]:
    """The model of a row, and the processor seconds that its method took."""
    folder = ASSETS / MODELS[kind]
    if name == "retrained":
        folder = ASSETS / f"{MODELS[kind]}_without_{concept.target}"
    model = load_generator(folder, steps=STEPS, guidance=GUIDANCE)
    start = time.process_time()
    if name == "negative prompt":
        model.guider = NegativePrompt(concept.words)
    elif name in METHODS:
        row = METHODS[name]
        settings = row.settings | row.own.get(concept.target, {})
        if row.anchored:
            concept = replace(concept, anchor=ANCHORS[concept.target])
        if row.make is ConceptSalUn:
            settings["pseudo"] = concept.anchor
        method = row.make(model, concept, seed=seed, **settings)
        model = run_method(method, row.steps or None, progress=False)
        model.steps, model.guidance = STEPS, GUIDANCE
    return model, time.process_time() - start


def cell(name: str, kind: str, target: str, seed: int, work: Path) -> None:
    """Run and measure one method with one seed, unless that is done."""
    file = work / kind / target / f"{name.replace(' ', '-')}-{seed}.json"
    if file.exists():
        return
    concept = CONCEPTS[target]
    print(f"{kind} {target} {name} seed {seed}", flush=True)
    model, seconds = make(name, kind, concept, seed)
    made = pictures(model, concept, seed)
    store = work / kind / target / f"original-{seed}.pt"
    if name == "original":
        store.parent.mkdir(parents=True, exist_ok=True)
        # Of other seeds: the kernel distance is for independent samples.
        torch.save(made | {"reference": pairs(model, REFERENCE_SEED + seed)}, store)
    before = torch.load(store, weights_only=True)
    kept = torch.tensor(
        [target not in (d, i) for d in DIGITS for i in INKS for _ in range(COMBINATIONS)]
    )
    distance = KernelDistance()
    distance.update(before["reference"][kept], reference=True)
    distance.update(made["pairs"][kept], reference=False)
    record: dict[str, Any] = {
        "counts": count(made, concept),
        "seconds": seconds,
        "kid": float(distance.compute()["distance"]),
    }
    if name != "original":
        change = PairedChange(["kept", "target"])
        change.update(before["pairs"][kept], made["pairs"][kept], "kept")
        change.update(before[target], made[target], "target")
        record["paired"] = {k: float(v) for k, v in change.compute().items()}
    threshold = noise_threshold(before["pairs"])
    empty = vacuous(made[target], noise_below=threshold, cell=2)
    record["vacuous"] = float((empty["constant"] | empty["noise"]).float().mean())
    if name != "negative prompt" and seed == 0:
        original = load_generator(ASSETS / MODELS[kind], steps=STEPS, guidance=GUIDANCE)
        judge_fn = sees(load_judge(), FACTOR[target], target)
        report = inversion_attack(model, original, concept, judge_fn, seed=PICTURES_SEED + seed)
        record["inversion"] = report.to_dict()
    atomic_write(file, json.dumps(record, indent=1) + "\n")


# ---- the table ----------------------------------------------------------------------------------


def pooled(records: list[dict[str, Any]], group: str) -> tuple[int, int]:
    """Hits and trials of a group, or of all groups with this beginning, over all seeds."""
    hits = trials = 0
    for record in records:
        for name, (hit, n) in record["counts"].items():
            if name == group or (group.endswith("/") and name.startswith(group)):
                hits, trials = hits + hit, trials + n
    return hits, trials


def rate(counts: tuple[int, int]) -> float:
    return counts[0] / counts[1]


def shown(counts: tuple[int, int]) -> str:
    low, high = wilson(*counts).low, wilson(*counts).high
    return f"{100 * rate(counts):.1f} ({100 * low:.0f}–{100 * high:.0f})"


def render(kind: str, work: Path) -> str:
    """The table of one model as Markdown."""
    lines: list[str] = []
    for target in CONCEPTS:
        rows: dict[str, list[dict[str, Any]]] = {}
        for name in (*REFERENCES, *METHODS):
            files = sorted((work / kind / target).glob(f"{name.replace(' ', '-')}-[0-9].json"))
            if files:
                rows[name] = [json.loads(file.read_text()) for file in files]
        if "original" not in rows:
            continue
        factor = FACTOR[target]
        chance = 1 / len(load_judge().factors[factor])
        first = rows["original"]
        groups = sorted({g for g in first[0]["counts"] if g.startswith(("digit/", "ink/"))})
        base = {g: rate(pooled(first, g)) for g in ("digit/", "ink/", *groups)}
        lines += [
            f"## {kind}: erase the {factor} '{target}'",
            "",
            f"Chance is {100 * chance:.0f} %. {len(first)} seeds pooled; pictures per row: "
            f"{pooled(first, 'target')[1]} of the target, {pooled(first, 'synonym')[1]} of its "
            f"synonym, {pooled(first, 'digit/')[1]} of the rest.",
            "",
            "| method | target % | in pairs % | synonym % | digits kept % | inks kept % "
            "| worst kept (change) | KID ×1000 | change kept / target | empty % "
            "| inversion brings back % | seconds | seeds | reaches |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, records in rows.items():
            change = {g: rate(pooled(records, g)) - base[g] for g in groups}
            worst = min(change, key=lambda g: change[g])
            found, kept = (
                pooled(records, "target"),
                min(rate(pooled(records, part)) - base[part] for part in ("digit/", "ink/")),
            )
            paired_rate = rate(pooled(records, "target in pairs"))
            gone = max(rate(found), paired_rate) <= chance
            reaches = "yes" if gone and kept >= -0.03 else "no"
            brought = [r["inversion"] for r in records if "inversion" in r]
            brought = [b for b in brought if b["attack_rate"] is not None]
            n = sum(b["n"] for b in brought)
            back = sum(b["attack_rate"] * b["n"] for b in brought) / n if n else None
            mean = {
                key: sum(r[key] for r in records) / len(records)
                for key in ("kid", "vacuous", "seconds")
                if key in records[0]
            }
            paired = [r["paired"] for r in records if "paired" in r]
            pair = (
                " / ".join(
                    f"{sum(p[k] for p in paired) / len(paired):.3f}" for k in ("kept", "target")
                )
                if paired
                else "–"
            )
            harm = f"{worst.partition('/')[2]} ({100 * change[worst]:+.0f})"
            kid = f"{1000 * mean['kid']:.2f}" if "kid" in mean else "–"
            lines.append(
                f"| {name} | {shown(found)} | {shown(pooled(records, 'target in pairs'))} "
                f"| {shown(pooled(records, 'synonym'))} | {shown(pooled(records, 'digit/'))} "
                f"| {shown(pooled(records, 'ink/'))} "
                f"| {harm if name != 'original' else '–'} | {kid} "
                f"| {pair} | {100 * mean['vacuous']:.0f} "
                f"| {'–' if back is None else f'{100 * back:.0f} (n={n})'} "
                f"| {mean['seconds']:.1f} | {len(records)} "
                f"| {reaches if name in METHODS else '–'} |"
            )
        lines.append("")
    return "\n".join(lines)


HEAD = """# Concept removal on the digit world

`python benchmarks/concept_table.py`. Rates in % with 95 % Wilson intervals. *Target*: pictures for
sentences with the concept's word; but for the bare word, other sentences than those the methods
were given. *In pairs*: "a photo of a (ink) (digit)" with it. Kept rates are over the pairs without
the target. *Reaches*: target, also in pairs, at most at chance, and kept digits and inks both at
most 3 points below the original. KID with the shipped CLIP's features, against the original's
pictures of other seeds; the prompts are the same, so it can be negative, and the original's own
value is the zero. *Inversion* learns one new token for the concept on the edited model from the
original's pictures (smoke budget, first seed): what it brings back was hidden, not removed.
*Retrained* never saw a picture of the target (trained for 1,000 of the 2,500 steps). Seconds are
processor time on one thread, on a busy machine.

The judge reads real test pictures with {digit:.1f} % (digit), {ink:.1f} % (ink) accuracy.

Settings: {tuning}

"""


def write(work: Path) -> None:
    """Write `benchmarks/results/concept_table.md`."""
    right = load_judge().accuracy
    text = HEAD.format(
        digit=100 * right["digit"], ink=100 * right["ink"], tuning=TUNING
    ) + "\n".join(render(kind, work) for kind in MODELS)
    rows = "\n".join(
        f"- {name}: {row.make.__name__}, {row.steps or 'no'} steps, "  # type: ignore[attr-defined]
        + (", ".join(f"{k} = {v}" for k, v in row.settings.items()) or "defaults")
        + (f"; anchors {ANCHORS}" if row.anchored else "")
        + "".join(f"; for {k}: {v}" for k, v in row.own.items())
        for name, row in METHODS.items()
    )
    atomic_write(RESULTS / "concept_table.md", text.rstrip() + f"\n\n## Settings\n\n{rows}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="unet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[*REFERENCES, *METHODS])
    parser.add_argument("--concepts", nargs="+", choices=list(CONCEPTS), default=list(CONCEPTS))
    parser.add_argument("--work", type=Path, default=Path("runs/concept_table"))
    parser.add_argument("--render", action="store_true", help="only write the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.render:
        for seed in given.seeds:
            for target in given.concepts:
                for name in given.methods or (*REFERENCES, *METHODS):
                    folder = ASSETS / f"{MODELS[given.model]}_without_{target}"
                    if name == "retrained" and not folder.is_dir():
                        continue  # retrained references are shipped for one concept only
                    cell(name, given.model, target, seed, given.work)
    write(given.work)


if __name__ == "__main__":
    main()
