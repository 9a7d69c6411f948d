r"""Classes forgotten by a detector, one after the other, beside retraining and controls.

    python benchmarks/detector_table.py digits                  # three seeds, two processes
    python benchmarks/detector_table.py digits --seeds 0
    python benchmarks/detector_table.py bccd --folder ../shared/data/bccd \
        --original runs/bccd/weights --retrained runs/bccd-retrained/weights
    python benchmarks/detector_table.py digits --render         # only write the table again

``digits``: the shipped detector of digit scenes forgets three, seven and five in three requests.
``bccd``: a detector of blood cells forgets platelets; `configs/detector/fit-bccd.yaml` trains it
and its retrained reference. Every figure is one of the audit that `mmforget forget` runs. The seed
decides all draws of a method, of its data and of the audit; there is one detector of each kind, and
baselines are run with the first seed only.
Settings are those of `configs/detector`. Finished parts are kept in the work folder, so that a
stopped run goes on. Writes `benchmarks/results/detector_<part>.md` and pictures beside it.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "mmforget" / "assets" / "digit_world"
SEEDS = (0, 1, 2)
EVERY_SEED = ("gs_lora", "gs_lora_plus_plus")
"""The others, which are there for comparison, are run with the first seed only."""
METHODS = ("gs_lora", "gs_lora_plus_plus", "neg_grad_plus", "salun", "ssd")
PICTURES = {"digits": 2, "bccd": 1}
SOURCES = {
    "digits": "Test scenes; GS-LoRA, first seed:",
    "bccd": "A test photo of BCCD (github.com/Shenggan/BCCD_Dataset, MIT licence, copyright of its "
    "authors) with boxes; GS-LoRA, first seed:",
}
COMPARED = ("retrained", "held_out", "controls", "control_epochs", "enabled")
TITLES = {
    "gs_lora": "GS-LoRA",
    "gs_lora_plus_plus": "GS-LoRA++",
    "neg_grad_plus": "NegGrad+",
    "salun": "SalUn",
    "ssd": "SSD",
}


def settings_of(part: str, method: str) -> dict[str, Any]:
    """The configuration of a method, of this data if there is one."""
    import yaml

    folder = ROOT / "configs" / "detector"
    own = folder / f"{method}-{part}.yaml"
    path = own if own.is_file() else folder / f"{method}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def measure(part: str, method: str, seed: int, work: Path, given: argparse.Namespace) -> None:
    """Forget all requests by one method at one seed, audit, and keep the results."""
    import torch
    from lightning.pytorch import Trainer

    import mmforget
    from mmforget import ForgetRequest, SequenceRunner, load_detector
    from mmforget.audit.controls import make_controls
    from mmforget.audit.detectors import DetectorAuditSettings, audit_detector
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.models import state_hash
    from mmforget.report import write_report

    torch.set_num_threads(1)
    config = settings_of(part, method)
    options = dict(config["data"]["init_args"])
    if part == "bccd":
        options["folder"] = str(given.folder)
    data = getattr(mmforget, config["data"]["class_path"])(**options, seed=seed)
    requests = [ForgetRequest(**request) for request in config["request"]]
    make = getattr(mmforget, config["method"]["class_path"])
    settings = config["method"].get("init_args", {})
    original, retrained = (load_detector(path) for path in (given.original, given.retrained))

    def trainer(**overrides: Any) -> Trainer:
        chosen = {
            "accelerator": "auto", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0,
            "use_distributed_sampler": False,
        } | config["trainer"]  # fmt: skip
        return Trainer(**(chosen | overrides))

    start = time.perf_counter()
    folder = work / f"{part}-{method}-{seed}.run"
    outcome = SequenceRunner(
        original,
        lambda model: make(model, seed=seed, **settings),
        data,
        requests,
        trainer,
        folder / "checkpoints",
    ).run()
    last = outcome.steps[-1]
    models = [
        AuditedModel(ModelEntry("original", "original", state_hash(original)), original),
        AuditedModel(
            ModelEntry(
                "unlearned", "unlearned", state_hash(outcome.model), method=last.method,
                access=last.access, cost=outcome.cost(),
            ),
            outcome.model,
        ),
        AuditedModel(
            ModelEntry(
                "retrained", "retrained", state_hash(retrained),
                cost=json.loads((given.retrained / "training.json").read_text())["cost"],
            ),
            retrained,
        ),
    ]  # fmt: skip
    data.request(*requests)
    if method == METHODS[0] and seed == SEEDS[0]:  # controls do not depend on the method
        models += make_controls(original, data, ("identity", "logit_mask", "head_only"), seed, 2)
    results = audit_detector(
        models,
        data,
        requests,
        DetectorAuditSettings(
            seed=seed, **{k: v for k, v in config["audit"].items() if k not in COMPARED}
        ),
        title=f"{TITLES[method]}, seed {seed}",
        sequence=outcome.rows,
        curves={"forgetting": outcome.curve},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_report([results], folder)
    (work / f"{part}-{method}-{seed}.json").write_text(results.to_json())
    print(f"{part} {method} {seed}: {time.perf_counter() - start:.0f} s", flush=True)


ALL_FORGOTTEN = "test_forgotten"
COLUMNS = (
    ("AP forgotten", "average_precision", ALL_FORGOTTEN),
    ("AP retained", "average_precision", "test_retain"),
    ("worst class lost", "worst_class_precision_drop", "test_retain"),
    ("still found", "found_rate", "test_forgotten"),
    ("another class", "moved_rate", "test_forgotten"),
    ("AP beside a forgotten object", "neighbour_average_precision", "test_retain_beside"),
    ("AP apart", "neighbour_average_precision", "test_retain_apart"),
    ("AP relearnt", "relearn_average_precision", "test_forgotten"),
)


def percent(values: list[float]) -> str:
    if not values:
        return "–"
    mean = 100 * statistics.mean(values)
    if len(values) == 1 or max(values) == min(values):
        return f"{mean:.1f}"
    return f"{mean:.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def render(part: str, work: Path) -> None:
    """Write the table and the pictures from all finished parts."""
    from mmforget.audit.results import Results

    found = {
        method: [
            Results.load(path) for seed in SEEDS
            if (path := work / f"{part}-{method}-{seed}.json").is_file()
        ]
        for method in METHODS
    }  # fmt: skip
    first = [one for one in found[METHODS[0]] if one] or next(iter(found.values()))
    names = first[0].data["class_names"]
    asked = ", then ".join(
        " and ".join(str(name) for name in request["classes"]) for request in first[0].requests
    )
    lines = [
        f"# Forgetting in a detector: {part}",
        "",
        f"`python benchmarks/detector_table.py {part}`: {asked}, of {len(names)} classes. Average "
        "precision (AP, per cent, COCO's mean over overlaps 0.50 to 0.95) on test images, mean "
        "over seeds with their range; *still found*, *another class*: share of forgotten objects "
        "with a box of that kind; *relearnt*: after the stronger of two attacks with few boxes; "
        "verdict: by the boxes, and in how many runs relearning brings back more than in the "
        "retrained model.",
        "",
        "| model | " + " | ".join(title for title, *_ in COLUMNS) + " | verdict |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]

    alone = len(first[0].requests) == 1

    def row(title: str, results: list[Any], model: str) -> str:
        cells = [
            percent([
                row.value for one in results for row in one.metrics
                if (row.metric, row.model, row.split) == (metric, model, split)
                and row.value is not None
            ])
            for _, metric, wanted in COLUMNS
            # of a single request the audit has no second row for all requests together
            for split in ("test_forget" if alone and wanted == ALL_FORGOTTEN and
                          metric == "average_precision" else wanted,)
        ]  # fmt: skip
        verdicts = [
            entry.details["outcome"].replace("_", " ") for one in results
            for entry in one.by_role("unlearned") if entry.name == model
        ]  # fmt: skip
        shown = [f"{verdict} {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)]
        back = sum(
            check.passed is False
            for one in results
            for check in one.checks
            if verdicts and check.name == f"relearning [{model}]"
        )
        shown += [f"brought back {back}"] if back else []
        return f"| {title} | " + " | ".join(cells) + f" | {', '.join(shown) or '–'} |"

    lines += [row("original", first, "original"), row("retrained", first, "retrained")]
    lines += [row(TITLES[method], runs, "unlearned") for method, runs in found.items() if runs]
    controls = [entry.name for entry in first[0].models if entry.role == "control"]
    lines += [row(f"control: {name}", first, name) for name in controls]
    lines += ["", "After each request (AP, per cent):", ""]
    steps = max(entry["step"] for entry in first[0].sequence)
    lines += [
        "| method | role | "
        + " | ".join(["before", *(f"request {s}" for s in range(1, steps + 1))])
        + " |",
        "|---|---|" + "---|" * (steps + 1),
    ]
    for method, runs in found.items():
        for role in ("forget", "previous", "retain") if runs else ():
            cells = [
                percent([
                    entry["accuracy"] for one in runs for entry in one.sequence
                    if entry["step"] == step and entry["split"] == role
                ])
                for step in range(steps + 1)
            ]  # fmt: skip
            lines.append(f"| {TITLES[method]} | {role} | " + " | ".join(cells) + " |")
    spent = {
        TITLES[method]: statistics.mean(
            entry.cost["seconds"] for one in runs for entry in one.by_role("unlearned")
        )
        for method, runs in found.items()
        if runs
    }
    shown = ", ".join(f"{title} {seconds:.0f}" for title, seconds in spent.items())
    lines += ["", f"Seconds for all requests, on a shared machine: {shown}."]
    pictures = [one for one in first[0].examples if one.get("images")][: PICTURES[part]]
    lines += ["", SOURCES[part]]
    for number, example in enumerate(pictures, start=1):
        for model in ("original", "unlearned", "retrained"):
            if model in example["images"]:
                name = f"detector_{part}_{number}_{model}.png"
                (RESULTS / name).write_bytes(base64.b64decode(example["images"][model]))
                lines += ["", f"{example['prompt']}, {model}:", "", f"![{model}]({name})"]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"detector_{part}.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("digits", "bccd"))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=ROOT.parent / "shared" / "data" / "bccd")
    parser.add_argument("--original", type=Path)
    parser.add_argument("--retrained", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "detector_table")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--render", action="store_true", help="only write the table again")
    given = parser.parse_args()
    if given.part == "digits":
        given.original = given.original or ASSETS / "detector"
        given.retrained = given.retrained or ASSETS / "detector_retrained"
    elif not given.render and not (given.original and given.retrained):
        parser.error("bccd needs --original and --retrained; see configs/detector/fit-bccd.yaml")
    given.work.mkdir(parents=True, exist_ok=True)
    if given.one:
        measure(given.part, given.one[0], int(given.one[1]), given.work, given)
        return
    if not given.render:
        jobs = [
            (method, seed)
            for method in given.methods
            for seed in (given.seeds if method in EVERY_SEED else given.seeds[:1])
            if not (given.work / f"{given.part}-{method}-{seed}.json").is_file()
        ]
        running: list[subprocess.Popen[bytes]] = []
        for method, seed in jobs:
            while sum(process.poll() is None for process in running) >= 2:
                time.sleep(1)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", method, str(seed)]
            running.append(subprocess.Popen(command))
        if any(process.wait() for process in running):
            sys.exit("a part failed; see above")
    render(given.part, given.work)


if __name__ == "__main__":
    main()
