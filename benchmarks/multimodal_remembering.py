"""How long the shipped multimodal model needs its picture, and what TVC and Vision Remember mend.

    python benchmarks/multimodal_remembering.py                      # about 25 minutes on one core
    python benchmarks/multimodal_remembering.py --only curve tvc     # a few minutes, no training

`curve` takes the picture away within answers about scenes of four digits: lists, for which the
picture is needed to the end, and lists with a conclusion that the list alone gives. `tvc` shows it
again, pooled, where it was taken away, and during ordinary answers. `remember` trains the model on
lists with pooled visual tokens, with and without Vision Remember, for equal steps. Writes
`benchmarks/results/multimodal_remembering.md`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmforget.audit.visual_forgetting_curve import CutAnswers, cut_answers
from mmforget.data.digit_questions import DigitQuestions
from mmforget.data.digit_words import BRIDGE
from mmforget.metrics.answers import exact_match
from mmforget.metrics.rates import Mean
from mmforget.models.multimodal import MultimodalLM, load_multimodal
from mmforget.retention.remembering_model import RememberingLM
from mmforget.retention.take_along import Reaffirmation
from mmforget.retention.visual_calibration import PeriodicVisualCalibration
from mmforget.seeds import generator

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "mmforget" / "assets" / "digit_world" / "multimodal"
RESULT = ROOT / "benchmarks" / "results" / "multimodal_remembering.md"
KINDS = {"list": 5, "read_then_answer": 9}
"""Kinds of questions, and at how many places the picture is taken away: after each token."""
POOLS = (1, 2, 4)


# ---- data ---------------------------------------------------------------------------------------


def scenes(data: DigitQuestions, kind: str, most: int) -> dict[str, Any]:
    """Questions of a kind about unseen scenes of four digits."""
    found = data.probe("test", kind)
    whole = [n for n, answer in enumerate(found.answers) if len(_listed(answer)) == 4]
    return dict(found[whole[:most]])


def _listed(answer: str) -> list[str]:
    return answer.split(" . ")[0].split()


def conclusion(answer: str, truth: str) -> float:
    """Whether the last word is right, whatever came before."""
    return float(answer.split()[-1:] == truth.split()[-1:])


def consistent(answer: str, _truth: str) -> float:
    """Whether the conclusion is that of the model's own list."""
    from mmforget.data.digit_world import DIGITS

    digits = [word for word in _listed(answer) if word in DIGITS]
    said = answer.split()
    return float(bool(digits) and said[-1] == max(digits, key=DIGITS.index))


# ---- the curve ----------------------------------------------------------------------------------


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(title) + " |",
        "|" + "---|" * len(title),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def means(values: Sequence[Mean]) -> list[str]:
    """Per cent, where there are at least 30 words."""
    return [percent(one.value if one.n >= 30 else None) for one in values]


def judged(found: CutAnswers, truths: Sequence[str], kind: str) -> list[list[str]]:
    """Rows of figures of one run: exact answers, and per kind what else there is to say."""
    exact = found.curve(truths)
    rows = [["exact", percent(exact.accuracy), *map(percent, exact.accuracies)]]
    if kind == "list":
        remaining = found.remaining(truths)
        rows.append(["words after the cut", "", *means(remaining)])
    else:
        for name, judge in (("conclusion", conclusion), ("fits its own list", consistent)):
            curve = found.curve(truths, judge)
            rows.append([name, percent(curve.accuracy), *map(percent, curve.accuracies)])
    return rows


def curve(model: MultimodalLM, data: DigitQuestions, given: argparse.Namespace) -> list[str]:
    lines = [
        "## Taking the picture away",
        "",
        "Per cent of right answers. *with* keeps the picture; column k takes it away after k "
        "tokens of the answer. *words after the cut*: share of right words among those still to "
        "say.",
        "",
    ]
    for kind, places in KINDS.items():
        batch = scenes(data, kind, given.samples)
        rows, summary = [], []
        for removal in ("reprefill", "evict", "blank"):
            found = cut_answers(
                model, batch["images"], batch["question"], places=places, removal=removal
            )
            for name, *figures in judged(found, batch["answer"], kind):
                rows.append([f"`{removal}`", name, *figures])
            shape = found.curve(batch["answer"]).to_dict()
            half = shape["half_life"]
            summary.append(
                f"`{removal}`: mean loss {percent(shape['area'])}, half-life "
                + ("none within the answer" if half is None else f"{half:g} of the answer")
            )
            print(kind, removal, rows[-1], flush=True)
        without = found.accuracy_without(batch["answer"]).value
        title = ["picture removed by", "", "with", *map(str, range(places))]
        lines += [
            f"### `{kind}`, {len(batch['answer'])} scenes of four digits",
            "",
            f"Without any picture: {percent(without)} exact. " + "; ".join(summary) + ".",
            "",
            *table(title, rows),
        ]
    return lines


# ---- TVC ----------------------------------------------------------------------------------------


def tvc(model: MultimodalLM, data: DigitQuestions, given: argparse.Namespace) -> list[str]:
    batch = scenes(data, "list", given.samples)
    asked = (batch["images"], batch["question"])
    rows = []
    for removal in ("reprefill", "evict"):
        for pool in (0, *POOLS):
            again = Reaffirmation(BRIDGE, pool) if pool else None
            found = cut_answers(model, *asked, places=5, removal=removal, again=again)
            shown = f"again, pooled {pool}x{pool}" if pool else "taken away"
            for name, *figures in judged(found, batch["answer"], "list"):
                rows.append([f"`{removal}`", shown, name, *figures])
            print(rows[-1], flush=True)
    lines = [
        "## Showing the picture again (TVC)",
        "",
        f"At the place where it is taken away the model is told “{BRIDGE}” and shown the picture "
        f"again, pooled. `list`, {len(batch['answer'])} scenes of four digits; columns as above.",
        "",
        *table(["removed by", "picture", "", "with", *map(str, range(5))], rows),
    ]
    rows = [["plain answers", "", *accuracies(model.answer(*asked), batch["answer"]), "0"]]
    for mode in ("move", "append", "refresh"):
        for pool in POOLS if mode != "refresh" else (1,):
            calibrated = PeriodicVisualCalibration(
                model, at=(0.5,), expected_tokens=4, pool=pool, mode=mode, bridge=BRIDGE
            )
            start = time.process_time()
            answers = calibrated.generate(*asked)
            seconds = time.process_time() - start
            texts = [one.text for one in answers]
            extra = statistics.fmean(one.extra_tokens for one in answers)
            figures = accuracies(texts, batch["answer"])
            shown = "" if mode == "refresh" else f"{pool}x{pool}"
            rows.append([f"`{mode}`", shown, *figures, f"{extra:.0f}"])
            print(rows[-1], f"{seconds:.1f} s", flush=True)
    return [
        *lines,
        "During ordinary answers, after half of the list (`PeriodicVisualCalibration`); *later "
        "words*: share of right words in the second half.",
        "",
        *table(["mode", "pool", "exact", "words", "later words", "extra tokens"], rows),
    ]


def accuracies(answers: Sequence[str], truths: Sequence[str]) -> list[str]:
    exact = [exact_match(a, t) for a, t in zip(answers, truths, strict=True)]
    words = [_words(a, t, 0) for a, t in zip(answers, truths, strict=True)]
    later = [_words(a, t, 2) for a, t in zip(answers, truths, strict=True)]
    return [percent(statistics.fmean(one)) for one in (exact, words, later)]


def _words(answer: str, truth: str, start: int) -> float:
    said, true = answer.split()[start:], truth.split()[start:]
    return sum(a == b for a, b in zip(said, true, strict=False)) / len(true)


# ---- Vision Remember ----------------------------------------------------------------------------


def pool_projector(model: MultimodalLM, pool: int) -> None:
    """Average pool x pool visual tokens behind the projector, and tell the processor."""
    projector = model.network.model.multi_modal_projector

    def pooled(_module: Any, _args: Any, output: Tensor) -> Tensor:
        side = round(output.shape[1] ** 0.5)
        plane = output.transpose(1, 2).unflatten(2, (side, side))
        return torch.nn.functional.avg_pool2d(plane, pool).flatten(2).transpose(1, 2)

    projector.register_forward_hook(pooled)
    model.processor = copy.deepcopy(model.processor)
    model.processor.patch_size *= pool


TRAINED = ("projector", "language", "head")


def plain(folder: Path, pool: int, seed: int, lr: float) -> MultimodalLM:
    model = MultimodalLM(folder, trained=TRAINED, lr=lr)
    if pool > 1:
        pool_projector(model, pool)
    return model


def remembering(folder: Path, pool: int, seed: int, lr: float, other: bool) -> RememberingLM:
    base = plain(folder, pool, seed, lr)
    model = RememberingLM(base.network, base.processor, trained=TRAINED, lr=lr, seed=seed)
    if other:  # the modules are there, but read another picture of the batch
        for reader in model.remember.readers.values():
            reader.register_forward_pre_hook(
                lambda _module, args: (args[0], args[1].roll(1, 0), *args[2:])
            )
    return model


@torch.no_grad()
def lists_right(model: MultimodalLM, batch: dict[str, Any]) -> tuple[float, float]:
    """Share of right lists and of right words in them, with the true words before."""
    exact, right, number = 0, 0.0, 0
    model.eval()
    for start in range(0, len(batch["answer"]), 100):
        part = {key: value[start : start + 100] for key, value in batch.items()}
        found = model.answer_logits(part)
        learnt = found.labels != -100
        hit = (found.logits.argmax(-1) == found.labels) & learnt
        exact += int((hit.sum(1) == learnt.sum(1)).sum())
        words = learnt & ~torch.isin(found.labels, torch.tensor(model.end_ids))
        right += float((hit & words).sum())
        number += int(words.sum())
    return exact / len(batch["answer"]), right / number


def train(model: MultimodalLM, data: Any, steps: int, size: int, seed: int) -> float:
    optimizer, schedule = model.optimizers_for(steps)
    draw = generator(seed, "multimodal_remembering")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    start = time.process_time()
    for _ in range(steps):
        rows = torch.randint(len(data), (size,), generator=draw).tolist()
        optimizer.zero_grad()
        model.loss(data[rows]).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return time.process_time() - start


def remember(model: MultimodalLM, data: DigitQuestions, given: argparse.Namespace) -> list[str]:
    lists, test = data.probe("train", "list"), data.probe("test", "list")
    batch = dict(test[list(range(min(len(test), given.lists)))])
    variants: list[tuple[str, Callable[[int], MultimodalLM]]] = [
        ("all 64 tokens", lambda seed: plain(given.model, 1, seed, given.lr))
    ]
    for pool in given.pools:
        tokens = f"{64 // pool**2} token" + "s" * (pool < 8)
        settings = (given.model, pool)
        variants += [
            (tokens, lambda seed, own=settings: plain(*own, seed, given.lr)),
            (
                f"{tokens}, Vision Remember",
                lambda seed, own=settings: remembering(*own, seed, given.lr, False),
            ),
        ]
    variants.append(
        (
            f"{tokens}, its modules on another picture",
            lambda seed, own=settings: remembering(*own, seed, given.lr, True),
        )
    )
    rows = []
    for name, build in variants:
        before = lists_right(build(0), batch)
        found, seconds, size, milliseconds = [], 0.0, 0, 0.0
        for seed in given.seeds:
            trained = build(seed)
            seconds += train(trained, lists, given.steps, given.batch, seed) / given.steps
            found.append(lists_right(trained, batch))
            modules = getattr(trained, "remember", None)
            size = 0 if modules is None else sum(p.numel() for p in modules.parameters())
            milliseconds = 1000 * seconds / (given.seeds.index(seed) + 1)
            print(name, seed, found[-1], f"{milliseconds:.0f} ms a step", flush=True)
        exact, words = zip(*found, strict=True)
        rows.append(
            [
                name,
                percent(before[0]),
                spread(exact),
                percent(before[1]),
                spread(words),
                f"{size:,}" if size else "",
                f"{milliseconds:.0f}",
            ]
        )
    total = sum(p.numel() for p in model.family.language_model(model.network).parameters())
    return [
        "## Pooled visual tokens with and without Vision Remember",
        "",
        f"The projector's 8x8 tokens are averaged; projector, language model and head (and the "
        f"modules) are trained on `list` for {given.steps} steps of {given.batch}, learning rate "
        f"{given.lr:g}, seeds {', '.join(map(str, given.seeds))}; {len(batch['answer'])} unseen "
        "scenes of one to four digits. Mean, and smallest to largest of the seeds. The control has "
        f"modules that read another picture. The language model has {total:,} parameters.",
        "",
        *table(
            ["visual tokens", "exact before", "exact", "words before", "words", "parameters added",
             "ms a step"],
            rows,
        ),
    ]  # fmt: skip


def spread(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return f"{percent(statistics.fmean(values))} ({low} to {high})"


# ---- all ----------------------------------------------------------------------------------------

PARTS = {"curve": curve, "tvc": tvc, "remember": remember}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--samples", type=int, default=300, help="scenes of four digits")
    parser.add_argument("--lists", type=int, default=1000, help="test scenes of `remember`")
    parser.add_argument("--pools", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    data = DigitQuestions(scenes=8000, eval_scenes=1500)
    model = load_multimodal(given.model)
    parts = [line for name in given.only for line in PARTS[name](model, data, given)]
    command = "python benchmarks/multimodal_remembering.py"
    if given.only != list(PARTS):
        command += " --only " + " ".join(given.only)
    minutes = (time.process_time() - start) / 60
    text = [
        "# Remembering the picture",
        "",
        f"`{command}`. The shipped model `digit_world/multimodal`; greedy answers about unseen "
        f"handwriting; one thread, {minutes:.0f} minutes of processor time.",
        "",
        *parts,
    ]
    given.result.write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
