"""A digit and an ink colour removed from a GAN by text alone, beside baselines and retrained ones.

    python benchmarks/gan_table.py                       # everything, two processes
    python benchmarks/gan_table.py --part seven --seeds 0
    python benchmarks/gan_table.py --part readers        # how far judge and guide can be trusted
    python benchmarks/gan_table.py --render              # only write the table again

Every figure is one of the audit that `mmforget erase gan` runs (`mmforget.audit.generators`): 2,000
pictures at the same latents for all models, read by the shipped judge, which has no part in the
methods; they follow the shipped CLIP model. The seed decides all draws of a method and its audit;
there is one generator of each kind. The retrained references were trained by the same script
without the concept. Everything but the method itself, and the conditional generator, is run with
seed 0 only, baselines with their default settings and on the digit. The part ``readers`` trains
nothing: it asks the judge about pictures that were shifted, the guide about the judge's sevens, and
both generators what they were meant to draw. Finished parts are kept in the work folder, so that a
stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
SEEDS = (0, 1, 2)
ATTACKS = ("latent_search", "mapper")
READERS = "readers"
SHIFT, PICTURES = 2, 2000


@dataclass(frozen=True)
class Run:
    """One method with its settings."""

    name: str
    target: str
    steps: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    discriminator: bool = False


MAIN = (
    Run("Text-to-Unlearn", "text_to_unlearn:TextToUnlearn", 300),
    Run(
        "as published", "text_to_unlearn:TextToUnlearn", 300,
        {"objective": "direction"},
    ),
)  # fmt: skip
BASELINES = (
    Run("CLIP direction", "clip_direction:ClipDirection", 300),
    Run("CLIP repulsion", "clip_repulsion:ClipRepulsion", 300),
    Run("anchor distillation", "anchor_distillation:AnchorDistillation", 300),
    Run("latent negation", "latent_negation:LatentNegation", 300, {"gate": "guide"}),
    Run("unit ablation", "unit_ablation:UnitAblation"),
    Run("Adapt-then-Unlearn", "adapt_then_unlearn:AdaptThenUnlearn", 300, {}, True),
    Run("parameter extrapolation", "parameter_extrapolation:ParameterExtrapolation", 200, {}, True),
)
CONDITIONAL = (
    Run("Text-to-Unlearn", "text_to_unlearn:TextToUnlearn", 300),
    Run("class rerouting", "class_rerouting:ClassRerouting"),
    Run("class distillation", "class_distillation:ClassDistillation", 300),
)
PARTS: dict[str, tuple[str, str, str, str]] = {
    "seven": ("gan", "digit", "seven", "gan_without_seven"),
    "red": ("gan", "ink", "red", "gan_without_red"),
    "conditional": ("gan_conditional", "digit", "seven", ""),
}
"""Part: generator, factor, concept, retrained reference."""

TITLES = {
    "seven": "A digit: “seven”",
    "red": "An ink colour: “red”",
    "conditional": "A class of the conditional generator: “seven”",
}


def runs_of(part: str, seed: int) -> Sequence[Run]:
    """The method at every seed; what it is compared with at the first one only."""
    if part == "conditional":
        return CONDITIONAL
    return (*MAIN, *BASELINES) if part == "seven" and seed == 0 else MAIN[:1]


def measure(part: str, seed: int, work: Path) -> None:
    import importlib

    import torch

    from mmforget import ConceptSpec, load_clip, load_gan, load_judge
    from mmforget.audit.cost import measured
    from mmforget.audit.generators import GANAuditSettings, audit_gan
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.erase import run_method
    from mmforget.errors import MMForgetError

    torch.set_num_threads(1)
    source, factor, word, reference = PARTS[part]
    judge, guide = load_judge(), load_clip("digit_world")
    others = [value for value in judge.factors[factor] if value != word]
    audited, refused = [], {}
    for run in runs_of(part, seed):
        module, _, name = run.target.partition(":")
        cls = getattr(importlib.import_module(f"mmforget.methods.{module}"), name)
        model = load_gan(source, discriminator=run.discriminator)
        try:
            with measured() as cost:
                method = cls(
                    model, ConceptSpec(word), guide, alternatives=others, seed=seed, **run.settings
                )
                unlearned: Any = run_method(method, run.steps, progress=False)
        except MMForgetError as error:  # a method that says it cannot do this: part of the result
            refused[run.name] = str(error)
            continue
        unlearned.discriminator = None
        print(f"{part} {seed} {run.name} {cost.to_dict()['seconds']:.0f} s", flush=True)
        entry = ModelEntry(
            run.name, "unlearned", method=name,
            cost=cost.to_dict() | {"sample_passes": method.cost()["sample_passes"]},
        )  # fmt: skip
        audited.append(AuditedModel(entry, unlearned))
    start = time.perf_counter()
    results = audit_gan(
        load_gan(source),
        audited,
        ConceptSpec(word),
        judge,
        guide,
        GANAuditSettings(seed=seed, attacks=ATTACKS, max_rate=0.01, attack_trials=100),
        [load_gan(ASSETS / reference)] if reference else [],
        alternatives={word: others},
    )
    print(f"{part} {seed} audit {time.perf_counter() - start:.0f} s", flush=True)
    content = {"results": json.loads(results.to_json()), "refused": refused}
    (work / f"{part}-{seed}.json").write_text(json.dumps(content))


# ---- the readers ---------------------------------------------------------------------------------


def measure_readers(seed: int, work: Path) -> None:
    """How far the judge, the guide and the conditional generator keep their word, at one seed."""
    import torch

    from mmforget import ConceptSpec, load_clip, load_gan, load_judge
    from mmforget.audit.generators import PURPOSE
    from mmforget.cli.erase_gan import real_pictures
    from mmforget.models.concept_guide import ConceptGuide

    torch.set_num_threads(1)
    judge, word = load_judge(), "seven"
    digits = list(judge.factors["digit"])
    guide = ConceptGuide(
        load_clip("digit_world"), [ConceptSpec(word)], {word: [d for d in digits if d != word]}
    )
    model, conditional = load_gan("gan"), load_gan("gan_conditional")
    latents = conditional.draw(PICTURES, seed, purpose=PURPOSE)
    with torch.no_grad():
        own = model.pictures(model.draw(PICTURES, seed, purpose=PURPOSE))
        sevens = own[judge(own)["digit"].argmax(1) == digits.index(word)]
        certain = guide.probabilities(sevens)[:, 0] > 0.5
        shown = judge(conditional.pictures(latents))["digit"].argmax(1)
    real = real_pictures()
    content = {
        "drawings": len(real),
        "shifted": changed_by_shift(judge, own),
        "shifted_real": changed_by_shift(judge, real),
        "guide_recall": float(certain.double().mean()),
        "obeyed": float((shown == latents.labels).double().mean()),
    }
    print(f"{READERS} {seed} {content}", flush=True)
    (work / f"{READERS}-{seed}.json").write_text(json.dumps(content))


def changed_by_shift(judge: Any, pictures: Any) -> float:
    """Share whose digit the judge reads differently, mean over the eight shifts by two pixels."""
    import torch
    from torch.nn.functional import pad

    side = pictures.shape[-1]
    wide = pad(pictures, [SHIFT] * 4, mode="replicate")
    starts = (0, SHIFT, 2 * SHIFT)
    with torch.no_grad():
        before = judge(pictures)["digit"].argmax(1)
        shares = [
            (judge(wide[..., top : top + side, left : left + side])["digit"].argmax(1) != before)
            for top in starts
            for left in starts
            if (top, left) != (SHIFT, SHIFT)
        ]
    return float(torch.stack(shares).double().mean())


# ---- the table -----------------------------------------------------------------------------------

COLUMNS = (
    ("native_rate", "native/{word}", "concept", 100),
    ("kept_worst", "kept", "worst other rate / original", 1),
    ("same_latent_keep", "clear", "same at same latent", 100),
    ("fid_to_original", "clear", "FD", 1),
    ("kid_to_original", "clear", "KD", 1),
    ("coverage", "clear", "coverage", 100),
    ("elicited_rate", "edited/{word}", "elicited", 100),
    ("attack_latent_search", "native/{word}", "latent search", 100),
    ("attack_mapper", "native/{word}", "new mapper", 100),
)


def value(results: dict[str, Any], metric: str, split: str, model: str) -> float | None:
    """One value; the smallest, where a split has a part for each of the judge's factors."""
    found = [
        row["value"]
        for row in results["metrics"]
        if row["metric"] == metric
        and row["model"] == model
        and (row["split"] == split or row["split"].startswith(f"{split}/"))
        and row["value"] is not None
    ]
    return min(found, default=None)


def cell(values: Sequence[float | None], scale: float) -> str:
    known = [scale * one for one in values if one is not None]
    if not known:
        return ""
    digits = 1 if scale == 100 else (2 if abs(known[0]) >= 0.1 else 3)
    text = f"{statistics.mean(known):.{digits}f}"
    return (
        text if len(known) == 1 else f"{text} ({min(known):.{digits}f} to {max(known):.{digits}f})"
    )


READERS_ROWS = (
    ("shifted", "pictures in which the judge reads another digit under the shift"),
    ("shifted_real", "the same for {drawings:,} drawings of the test strokes"),
    ("guide_recall", "of the judge's sevens, those that are sevens to the guide too (P > 0.5)"),
    ("obeyed", "of the conditional generator's, those in which the judge reads their class"),
)


def readers_lines(work: Path) -> list[str]:
    files = [work / f"{READERS}-{seed}.json" for seed in SEEDS]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    if not found:
        return []
    rows = [
        f"| {what.format(**found[0])} | {len(found)} | {cell([one[key] for one in found], 100)} |"
        for key, what in READERS_ROWS
    ]
    return [
        "## The readers themselves", "",
        "`python benchmarks/gan_table.py --part readers`. Per cent of "
        f"{PICTURES:,} pictures that a generator draws, or of what the row names. The shift moves "
        f"a picture by {SHIFT} pixels along one axis or both and repeats its border; mean over the "
        "eight of them.", "",
        "| | seeds | per cent |", "|---|---|---|", *rows, "",
    ]  # fmt: skip


def render(work: Path) -> None:
    lines = [
        "# Text-guided unlearning in GANs: a digit and an ink colour",
        "",
        "`python benchmarks/gan_table.py`. Rates in per cent, of 2,000 pictures read by the judge; "
        "mean and range over seeds. FD and KD: Fréchet and kernel distance of pictures without the "
        "concept from those of the original, in features of the judge; the row *original, other "
        "latents* is what chance alone changes; models at the same latents can lie below it. "
        "*Elicited*: by the original's own edit. *Latent search* and *new mapper* attack each "
        "model; what they find in the retrained one is found without any memory. Seconds are wall "
        "time beside other jobs.",
        "",
    ]
    for part, (_, _, word, _) in PARTS.items():
        found = {
            seed: json.loads((work / f"{part}-{seed}.json").read_text())
            for seed in SEEDS
            if (work / f"{part}-{seed}.json").is_file()
        }
        if not found:
            continue
        lines += [f"## {TITLES[part]}", ""]
        heads = [title for _, _, title, _ in COLUMNS]
        lines += ["| | seeds | " + " | ".join(heads) + " | seconds |"]
        lines += ["|---" * (len(heads) + 3) + "|"]
        names: list[str] = []
        for one in found.values():
            names += [m["name"] for m in one["results"]["models"] if m["name"] not in names]
        for name in names:
            having = [
                one["results"]
                for one in found.values()
                if any(m["name"] == name for m in one["results"]["models"])
            ]
            cells = [
                cell(
                    [value(results, metric, split.format(word=word), name) for results in having],
                    scale,
                )
                for metric, split, _, scale in COLUMNS
            ]
            seconds = [
                m["cost"].get("seconds") for r in having for m in r["models"] if m["name"] == name
            ]
            known = [one for one in seconds if one is not None]
            time_taken = f"{statistics.mean(known):.0f}" if known else ""
            lines.append(f"| {name} | {len(having)} | {' | '.join(cells)} | {time_taken} |")
        lines.append("")
        for name in ("Text-to-Unlearn",):
            rates = kept_rates(found, name)
            if rates:
                shown = ", ".join(f"{what} {ratio:.2f}" for what, ratio in rates.items())
                lines += [f"{name}, rate over that of the original: {shown}.", ""]
        for seed, one in found.items():
            for what, why in one["refused"].items():
                lines += [f"Refused (seed {seed}): {what}: {why}", ""]
    lines += readers_lines(work)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gan_table.md").write_text("\n".join(lines), encoding="utf-8")
    print(RESULTS / "gan_table.md")


def kept_rates(found: dict[int, Any], name: str) -> dict[str, float]:
    """Per kept value the mean ratio over seeds, plain rates without any correction."""
    ratios: dict[str, list[float]] = {}
    for one in found.values():
        rows = [row for row in one["results"]["metrics"] if row["metric"] == "kept_rate"]
        first = {row["split"]: row["value"] for row in rows if row["model"] == "original"}
        for row in rows:
            if row["model"] == name and first.get(row["split"]):
                ratios.setdefault(row["split"].rpartition("/")[2], []).append(
                    row["value"] / first[row["split"]]
                )
    return {what: statistics.mean(values) for what, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, READERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("runs/gan-table"))
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.part:
        for seed in given.seeds:
            if not (given.work / f"{given.part}-{seed}.json").is_file():
                if given.part == READERS:
                    measure_readers(seed, given.work)
                else:
                    measure(given.part, seed, given.work)
    elif not given.render:
        base = [sys.executable, __file__, "--work", str(given.work)]
        queue = [
            (part, seed)
            for seed in given.seeds
            for part in (*PARTS, READERS)
            if seed == 0 or part != "conditional"
        ]
        running: list[subprocess.Popen[bytes]] = []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        while queue or running:
            while queue and len(running) < 2:
                part, seed = queue.pop(0)
                command = [*base, "--part", part, "--seeds", str(seed)]
                running.append(subprocess.Popen(command, env=environment))
            time.sleep(1)
            for one in running:
                if one.poll():
                    raise SystemExit(f"a part failed with exit code {one.returncode}")
            running = [one for one in running if one.poll() is None]
    if not given.part:
        render(given.work)


if __name__ == "__main__":
    main()
