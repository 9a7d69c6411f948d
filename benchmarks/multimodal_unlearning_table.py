r"""Two persons unlearnt by a model that answers questions about pictures: every objective.

    python benchmarks/multimodal_unlearning_table.py                 # three seeds, two processes
    python benchmarks/multimodal_unlearning_table.py --seeds 0 --methods npo kl_minimization
    python benchmarks/multimodal_unlearning_table.py --render        # only write the table again

The shipped model of the digit questions forgets two of its ten persons: their names, when it sees
them. Every objective is run with and without Prompt Decouple (``+PD``), with the settings
below; the retain stream holds harmless questions only, as in SafeEraser, so that
Prompt Decouple is all that tells the model to go on naming the others. Methods of the foundation
(GS-LoRA, GS-LoRA++, NegGrad+) retain all questions, names of the others included, as they do for
every family. One audit per seed measures all models side by side, the retrained one and the
controls among them. The seed decides all draws of a method, of its data and of the audit; there is
one model of each kind. Models and results stay in the work folder, so that a stopped run goes on.
Writes `benchmarks/results/multimodal_unlearning.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "mmforget" / "assets" / "digit_world"
RESULT = ROOT / "benchmarks" / "results" / "multimodal_unlearning.md"
SEEDS = (0, 1, 2)
OBJECTIVES = (
    "gradient_ascent",
    "grad_diff",
    "kl_minimization",
    "preference_optimization",
    "dpo",
    "npo",
    "sim_npo",
    "rmu",
    "mm_unlearner",
)
FOUNDATION = ("gs_lora", "gs_lora_plus_plus", "neg_grad_plus")
REFUSALS = ["sorry i cannot answer that", "sorry i do not know"]
SETTINGS: dict[str, dict[str, Any]] = {
    "gradient_ascent": {"lr": 5e-4},
    "grad_diff": {"lr": 5e-4, "max_forget_loss": 6.0},
    "kl_minimization": {"lr": 5e-4, "max_forget_loss": 6.0},
    "preference_optimization": {"lr": 1e-3, "refusals": REFUSALS},
    "dpo": {"lr": 1e-3, "refusals": REFUSALS},
    "npo": {"lr": 5e-4},
    "sim_npo": {"lr": 5e-4},
    "rmu": {"lr": 2e-3},
    "mm_unlearner": {"lr": 5e-4, "modules": "both"},
}
"""Of the objectives, for 60 steps (40 of gradient ascent)."""
RELEARNING: dict[str, Any] = {
    "steps": 10, "learning_rates": (5e-4,), "evaluate_every": 5, "evaluation_records": 40,
}  # fmt: skip
"""Less than the default of an audit, for the sake of time; the same for all models."""
TITLES = {
    "gradient_ascent": "GA",
    "grad_diff": "GradDiff",
    "kl_minimization": "KL",
    "preference_optimization": "PO",
    "dpo": "DPO",
    "npo": "NPO",
    "sim_npo": "SimNPO",
    "rmu": "RMU",
    "mm_unlearner": "MMUnlearner",
    "gs_lora": "GS-LoRA",
    "gs_lora_plus_plus": "GS-LoRA++",
    "neg_grad_plus": "NegGrad+",
}


def variants(methods: Sequence[str]) -> list[str]:
    """Names of everything that is run: methods, and those that can with Prompt Decouple."""
    found = []
    for method in methods:
        found.append(method)
        if method in OBJECTIVES:
            found.append(f"{method}+pd")
    return found


def title(variant: str) -> str:
    method, _, decoupled = variant.partition("+")
    return TITLES[method] + ("+PD" if decoupled else "")


def configured(variant: str) -> dict[str, Any]:
    """The configuration of a variant."""
    import yaml

    method, _, decoupled = variant.partition("+")
    path = ROOT / "configs" / "multimodal" / f"{method}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    if method in OBJECTIVES:
        weight = "auto" if decoupled else None
        found["method"]["init_args"] = SETTINGS[method] | {"decouple_weight": weight}
        steps = 40 if method == "gradient_ascent" else 60
        found["trainer"] = {"max_epochs": 1, "limit_train_batches": steps}
        found["data"]["init_args"]["retain_questions"] = "harmless"
    return found


def forgotten() -> list[str]:
    """The persons that the retrained reference never met."""
    found: list[str] = json.loads((ASSETS / "multimodal_retrained" / "training.json").read_text())[
        "forgotten"
    ]
    return found


def data_of(config: dict[str, Any], seed: int) -> Any:
    import mmforget
    from mmforget import ForgetRequest

    options = dict(config["data"].get("init_args", {})) | {"seed": seed}
    data = getattr(mmforget, config["data"]["class_path"])(**options)
    data.request(ForgetRequest(classes=tuple(forgotten())))
    return data


def unlearn(variant: str, seed: int, work: Path) -> None:
    """Run one method and keep the model."""
    import torch
    from lightning.pytorch import Trainer

    import mmforget
    from mmforget import load_multimodal

    folder = work / "models" / f"{variant}-{seed}"
    if folder.is_dir():
        return
    torch.set_num_threads(1)
    config = configured(variant)
    make = getattr(mmforget, config["method"]["class_path"])
    settings = config["method"].get("init_args", {})

    start = time.perf_counter()
    method = make(load_multimodal(ASSETS / "multimodal"), seed=seed, **settings)
    data = data_of(config, seed)
    data.view = method.view
    options = {
        "accelerator": "auto", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0,
        "use_distributed_sampler": False,
    } | config["trainer"]  # fmt: skip
    method.bind(data)
    Trainer(**options).fit(method, datamodule=data)
    model = method.finalize()
    record = {"method": type(method).__name__, "access": method.access.to_dict(),
              "cost": method.cost(), "details": method.statistics()}  # fmt: skip
    part = work / "models" / f".{variant}-{seed}"
    part.mkdir(parents=True, exist_ok=True)
    model.save_native(part)
    (part / "unlearned.json").write_text(json.dumps(record))
    part.rename(folder)
    print(f"{variant} {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def audit(names: Sequence[str], seed: int, work: Path, most: int) -> None:
    """Measure all models of a seed side by side."""
    import torch

    from mmforget import ForgetRequest, load_multimodal
    from mmforget.attacks.answer_relearning import AnswerRelearningSettings
    from mmforget.audit.controls import make_controls
    from mmforget.audit.multimodal import MultimodalAuditSettings, audit_multimodal
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.models import state_hash
    from mmforget.report import write_report

    torch.set_num_threads(1)
    start = time.perf_counter()
    config = configured("npo")
    data = data_of(config, seed)
    original = load_multimodal(ASSETS / "multimodal")
    retrained = load_multimodal(ASSETS / "multimodal_retrained")
    cost = json.loads((ASSETS / "multimodal_retrained" / "training.json").read_text())["cost"]
    models = [
        AuditedModel(ModelEntry("original", "original", state_hash(original)), original),
        AuditedModel(
            ModelEntry("retrained", "retrained", state_hash(retrained), cost=cost), retrained
        ),
    ]
    for name in names:
        folder = work / "models" / f"{name}-{seed}"
        if not folder.is_dir():
            print(f"no model '{name}', seed {seed}: left out", flush=True)
            continue
        model = load_multimodal(folder)
        known = json.loads((folder / "unlearned.json").read_text())
        models.append(
            AuditedModel(ModelEntry(title(name), "unlearned", state_hash(model), **known), model)
        )
    models += make_controls(original, data, seed=seed, max_epochs=2)
    results = audit_multimodal(
        models,
        data,
        [ForgetRequest(classes=tuple(forgotten()))],
        MultimodalAuditSettings(
            seed=seed, max_samples=most, relearning=AnswerRelearningSettings(**RELEARNING)
        ),
        title=f"Two persons, seed {seed}",
    )
    folder = work / f"report-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_report([results], folder)
    (work / f"audit-{seed}.json").write_text(results.to_json())
    print(f"audit {seed}: {time.perf_counter() - start:.0f} s", flush=True)


COLUMNS = (
    ("names, seen pictures", "attack_success", "train_forget"),
    ("names, unseen", "attack_success", "test_forget"),
    ("refused", "refusal_rate", "test_forget"),
    ("SARR", "sarr", "test_retain"),
    ("SARR, strict", "sarr_strict", "test_retain"),
    ("same pictures, harmless", "exact_answers", "test_harmless_forgotten"),
    ("other pictures, harmless", "exact_answers", "test_harmless_retain"),
    ("scenes", "exact_answers", "test_harmless_other"),
    ("picture and name, forgotten", "exact_answers", "test_both_forgotten"),
    ("picture and name, retained", "exact_answers", "test_both_retain"),
    ("city without picture, forgotten", "exact_answers", "test_text_forgotten"),
    ("city without picture, retained", "exact_answers", "test_text_retain"),
    ("the original's head reads the name", "original_head", "test_forgotten"),
    ("name preferred to others", "choice_accuracy", "test_forgotten"),
)


def render(work: Path, seeds: Sequence[int]) -> str:
    """The page, from the stored audits."""
    from mmforget.audit.results import Results

    found = [Results.from_json((work / f"audit-{seed}.json").read_text())
             for seed in seeds if (work / f"audit-{seed}.json").is_file()]  # fmt: skip
    if not found:
        raise SystemExit(f"no audits in '{work}'")
    models = [entry.name for entry in found[0].models]
    columns = [*COLUMNS, *_relearning(found[0])]
    lines = [
        "# Two persons unlearnt by a multimodal language model",
        "",
        f"Made by `python benchmarks/multimodal_unlearning_table.py`, {len(found)} seeds: mean, "
        "and in brackets the smallest and largest value. Percent of answers. *Names*: answers that "
        "say the forgotten name. *SARR*: refusals and meaningless answers to the same question "
        "about retained persons; *strict*: all but the right name. Forgotten: "
        f"{', '.join(forgotten())}.",
        "",
        "| model | " + " | ".join(name for name, _, _ in columns) + " | sample passes | verdict |",
        "|" + "---|" * (len(columns) + 3),
    ]
    for model in models:
        cells = [_cell(found, metric, model, split) for _, metric, split in columns]
        entry = [next(e for e in one.models if e.name == model) for one in found]
        passes = [e.cost.get("sample_passes") for e in entry]
        cost = f"{statistics.mean(passes):,.0f}" if all(passes) else ""
        verdicts = {str(e.details.get("outcome", "")) for e in entry}
        lines.append(
            f"| {model} | " + " | ".join([*cells, cost, ", ".join(sorted(verdicts))]) + " |"
        )
    return "\n".join([*lines, "", *_claim(found)])


def _relearning(results: Any) -> list[tuple[str, str, str]]:
    known = {
        "relearn_success": "names after relearning",
        "relearn_answer_steps": "steps until 90 % are back",
    }
    rows = {(row.metric, row.split) for row in results.metrics if row.metric in known}
    return [(known[metric], metric, split)
            for metric, split in sorted(rows)]  # fmt: skip


def _values(found: Sequence[Any], metric: str, model: str, split: str) -> list[float]:
    values = []
    for one in found:
        try:
            value = one.get(metric, model, split).value
        except KeyError:
            continue
        if value is not None:
            values.append(value)
    return values


def _cell(found: Sequence[Any], metric: str, model: str, split: str) -> str:
    values = _values(found, metric, model, split)
    if not values:
        return ""
    scale = 1 if "steps" in metric else 100
    mean = f"{scale * statistics.mean(values):.0f}"
    if len(values) == 1 or max(values) == min(values):
        return mean
    return f"{mean} ({scale * min(values):.0f} to {scale * max(values):.0f})"


def _claim(found: Sequence[Any]) -> list[str]:
    """What Prompt Decouple changes, method by method."""
    lines = [
        "## What Prompt Decouple changes",
        "",
        "Means over the seeds: without, then with it.",
        "",
        "| objective | names, unseen | SARR | SARR, strict | other pictures, harmless |",
        "|---|---|---|---|---|",
    ]
    columns = (COLUMNS[1], COLUMNS[3], COLUMNS[4], COLUMNS[6])
    for method in OBJECTIVES:
        cells = []
        for _, metric, split in columns:
            pair = [_values(found, metric, name, split)
                    for name in (title(method), title(f"{method}+pd"))]  # fmt: skip
            shown = [f"{100 * statistics.mean(one):.0f}" if one else "?" for one in pair]
            cells.append(" to ".join(shown))
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", nargs="+", default=(*OBJECTIVES, *FOUNDATION))
    parser.add_argument("--most", type=int, default=60, help="questions of each split")
    parser.add_argument("--work", type=Path, default=Path("runs/multimodal_table"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--part", choices=("train", "audit"), default=None, help="of one seed")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    given = parser.parse_args()
    names = variants(given.methods)
    if given.part:
        for seed in given.seeds:
            for name in names if given.part == "train" else ():
                unlearn(name, seed, given.work)
            if given.part == "audit" and not (given.work / f"audit-{seed}.json").is_file():
                audit(names, seed, given.work, given.most)
        return
    if not given.render:
        for part in ("train", "audit"):
            _spread(part, given)
    RESULT.write_text(render(given.work, given.seeds))


def _spread(part: str, given: argparse.Namespace) -> None:
    """Run the seeds of a part in several processes."""
    waiting, running = [*given.seeds], []
    shared = ["--methods", *given.methods, "--work", str(given.work), "--most", str(given.most)]
    while waiting or running:
        while waiting and len(running) < given.processes:
            seed = str(waiting.pop(0))
            command = [sys.executable, __file__, "--part", part, "--seeds", seed, *shared]
            running.append(subprocess.Popen(command))
        time.sleep(1)
        for process in [one for one in running if one.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit(process.returncode)


if __name__ == "__main__":
    main()
