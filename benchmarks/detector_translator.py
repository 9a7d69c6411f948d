"""A translator in front of the shipped detector: another modality, and a digit made invisible.

    python benchmarks/detector_translator.py                     # minutes on one core
    python benchmarks/detector_translator.py --only suppress --forget seven

`adapt` fits scenes in inverted colours, beside fine-tuning the detector itself for as many steps;
`suppress` hides one digit. Writes `benchmarks/results/detector_translator.md`. The translator is
small and drawn from a seed: no ImageNet weights, no download.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from mmforget.data.digit_scenes import DigitScenes, SceneImages
from mmforget.models.detector import Detector

ROOT = Path(__file__).resolve().parents[1]
DETECTOR = ROOT / "mmforget" / "assets" / "digit_world" / "detector"
RESULT = ROOT / "benchmarks" / "results" / "detector_translator.md"
BATCH, CLIP = 8, 0.5


class InvertedImages(SceneImages):
    """Scenes in inverted colours: dark ink on a bright canvas."""

    def read(self, rows: Any) -> torch.Tensor:
        """Draw, and invert."""
        return 255 - super().read(rows)


class InvertedScenes(DigitScenes):
    """`DigitScenes` as another sensor might see them."""

    def build(self) -> Any:
        """The stages of the scenes, inverted."""
        stages = super().build()
        for images in stages.values():
            images.__class__ = InvertedImages
        return stages


def precision(model: Detector, data: DigitScenes) -> float:
    from mmforget.audit.detector_outputs import find, middle_size, precision_of

    test: Any = data.dataset("test")
    classes = range(data.num_classes)
    found = precision_of(find(model, test), test, classes, middle_size(test), model.most)
    assert found.value is not None
    return 100 * found.value


def fit(module: Any, data: DigitScenes, epochs: int, seed: int) -> float:
    torch.manual_seed(seed)
    start = time.process_time()
    Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, gradient_clip_val=CLIP, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, datamodule=data)  # fmt: skip
    return time.process_time() - start


def adapt(detector: Detector, given: argparse.Namespace) -> list[str]:
    from mmforget.models.base import state_hash
    from mmforget.retention import ModTr

    sizes = {"scenes": given.scenes, "eval_scenes": given.eval_scenes, "batch_size": BATCH}
    source, other = DigitScenes(**sizes), InvertedScenes(**sizes)
    before = state_hash(detector)
    rows = [("detector alone", precision(detector, other), precision(detector, source), 0.0)]
    print(rows, flush=True)
    for fusion in given.fusions:
        method = ModTr(
            detector, "adapt", "small", fusion, width=given.width, lr=given.lr, seed=given.seed
        )
        other.view = "full"
        seconds = fit(method, other, given.epochs, given.seed)
        translated = method.finalize()
        source_after = precision(translated.detector, source)  # the translator left out
        rows.append((f"ModTr, fusion `{fusion}`", precision(translated, other), source_after,
                     seconds))  # fmt: skip
        assert state_hash(detector) == before
        print(rows[-1], flush=True)
    if given.fine_tune:
        tuned = copy.deepcopy(detector)
        tuned.lr = given.tune_lr
        seconds = fit(tuned, other, given.epochs, given.seed)
        tuned.eval()
        rows.append(("detector fine-tuned", precision(tuned, other), precision(tuned, source),
                     seconds))  # fmt: skip
        print(rows[-1], flush=True)
    return [
        "## Another modality: inverted colours",
        "",
        f"{given.epochs} epochs of {given.scenes} scenes in batches of {BATCH}; translator `small` "
        f"of width {given.width}, learning rate {given.lr:g}"
        + (f" (fine-tuning {given.tune_lr:g})" if given.fine_tune else "")
        + f"; {given.eval_scenes} test scenes. ModTr's source precision is that of the bypass: "
        "the detector's state hash is that of before, so it is exactly kept.",
        "",
        "| | AP inverted | AP source | seconds of training |",
        "|---|---|---|---|",
        *(f"| {name} | {a:.1f} | {b:.1f} | {c:.0f} |" for name, a, b, c in rows),
        "",
    ]


def suppress(detector: Detector, given: argparse.Namespace) -> list[str]:
    from mmforget.audit.detector_outputs import role_precision
    from mmforget.request import ForgetRequest
    from mmforget.retention import ModTr

    data = DigitScenes(scenes=given.scenes, eval_scenes=given.eval_scenes, batch_size=BATCH)
    split = data.request(ForgetRequest(classes=(given.forget,)))
    shown = data.subset("test", "forget")
    scenes = shown[list(range(len(shown)))]

    def measured(model: Detector) -> tuple[float, float, float, float]:
        found = {
            row["split"]: 100 * row["average_precision"] for row in role_precision(model, data)
        }
        with torch.no_grad():
            parts = [
                model.logits({key: value[i : i + 32] for key, value in scenes.items()})
                for i in range(0, len(shown), 32)
            ]
        score = torch.cat(parts)[:, list(split.forget_classes)].sigmoid()
        seen = 100 * float((score >= 0.5).float().mean())
        return found["forget"], found["retain"], float(score.mean()), seen

    rows = [("detector", measured(detector))]
    print(rows, flush=True)
    method = ModTr(
        detector, "suppress", "small", given.suppress_fusion, width=given.width, lr=given.lr,
        seed=given.seed, beta=given.beta,
    )  # fmt: skip
    data.view = "paired"
    seconds = fit(method, data, given.suppress_epochs, given.seed)
    translated = method.finalize()
    rows.append((f"with ModTr, fusion `{given.suppress_fusion}`", measured(translated)))
    rows.append(("ModTr left out", measured(translated.detector)))
    print(rows[1:], method.statistics(), flush=True)
    return [
        f"## A digit suppressed: “{given.forget}”",
        "",
        f"{given.suppress_epochs} epochs of the paired view, {given.scenes} scenes, batches of "
        f"{BATCH} and {BATCH}, {seconds:.0f} s of training; beta {given.beta:g}, bound "
        f"{method.bound:g}, hinge open in {100 * method.statistics()['hinge_open_share']:.0f} % of "
        "the steps. *Score*: highest score of the digit in a test scene that shows it, mean; "
        f"*seen*: per cent of these scenes where it is at least 0.5. {translated.note[0].upper()}"
        f"{translated.note[1:]}.",
        "",
        f"| | AP “{given.forget}” | AP others | score | seen |",
        "|---|---|---|---|---|",
        *(f"| {name} | {a:.1f} | {b:.1f} | {c:.2f} | {d:.0f} |" for name, (a, b, c, d) in rows),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("adapt", "suppress"))
    parser.add_argument("--detector", type=Path, default=DETECTOR)
    parser.add_argument("--forget", default="seven", help="the digit to suppress")
    parser.add_argument("--scenes", type=int, default=800)
    parser.add_argument("--eval-scenes", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2, help="of adapt, and of fine-tuning")
    parser.add_argument("--suppress-epochs", type=int, default=3)
    parser.add_argument("--fusions", nargs="+", default=["none"], help="of adapt")
    parser.add_argument("--suppress-fusion", default="none")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--tune-lr", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-fine-tune", dest="fine_tune", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()

    from mmforget.models.detector import load_detector

    torch.set_num_threads(1)
    detector = load_detector(given.detector)
    lines = [
        "# A translator in front of a frozen detector",
        "",
        "`python benchmarks/detector_translator.py`. Average precision (0.50 to 0.95) in per cent; "
        f"seed {given.seed}, one run; processor seconds of one thread.",
        "",
    ]
    for part in (adapt, suppress):
        if given.only in (None, part.__name__):
            lines += part(detector, given)
    given.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
