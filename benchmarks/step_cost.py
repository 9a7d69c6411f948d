"""What a step costs over its bound, as ratios measured in one run.

    python benchmarks/step_cost.py

* GS-LoRA++ against plain LoRA fine-tuning on the same images (target: at most 1.15), also in its
  proximal mode and with all terms. The two steps alternate, and medians are compared.
* SSD's importance pass against one backward pass per sample, bare and with the squares that SSD
  needs (target: at least 5 times as fast).

Writes `benchmarks/results/step_cost.json`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmforget import SSD, DigitWorld, ForgetRequest, GSLoRA, GSLoRAPlusPlus, load_classifier

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 25


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each step; the steps take turns, so that load hits them alike."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_classifier(ROOT / "mmforget/assets/digit_world/classifier_vit")
    data = DigitWorld(batch_size=64)
    data.request(ForgetRequest(classes=("three",)))
    batch = {role: data.subset("train", role)[list(range(64))] for role in ("forget", "retain")}

    def unlearning(method: GSLoRA, threshold: float = 0.0) -> Callable[[], None]:
        method.model.train()
        optimizer = torch.optim.AdamW(method.parameter_groups(), lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            torch.stack(list(method.losses(batch).values())).sum().backward()
            optimizer.step()
            if threshold:
                method.shrink(threshold)

        return step

    def plus_plus(**settings: object) -> GSLoRAPlusPlus:
        method = GSLoRAPlusPlus(model, **settings)
        method.bind(data)
        method.compute_prototypes()
        return method

    def fine_tuning() -> Callable[[], None]:
        method = GSLoRA(model)  # the same adapters, without the method's loss
        method.model.train()
        optimizer = torch.optim.AdamW(method.parameter_groups(), lr=1e-5)
        images = torch.cat([batch["forget"]["image"], batch["retain"]["image"]])
        labels = torch.cat([batch["forget"]["label"], batch["retain"]["label"]])

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(method.model(images), labels).backward()
            optimizer.step()

        return step

    steps = compare(
        {
            "LoRA fine-tuning": fine_tuning(),
            "GS-LoRA": unlearning(GSLoRA(model)),
            "GS-LoRA++": unlearning(plus_plus()),
            "GS-LoRA++, both prototype terms": unlearning(plus_plus(w_retain=0.1)),
            "GS-LoRA++ proximal": unlearning(plus_plus(proximal=True), threshold=1e-6),
        }
    )
    bound = steps["LoRA fine-tuning"]

    whole = data.subset("train", "retain")
    some = whole[list(range(128))]
    importance = SSD(model, kind="empirical_fisher")
    importance.model.eval()
    lone = SSD(model).model.eval()

    def one_by_one() -> None:
        for row in range(32):
            lone.zero_grad()
            lone.loss({key: value[row : row + 1] for key, value in some.items()}).sum().backward()

    squares = [torch.zeros_like(p, dtype=torch.float64) for p in lone.parameters()]

    def loop_with_squares() -> None:
        for row in range(32):
            lone.zero_grad()
            lone.loss({key: value[row : row + 1] for key, value in some.items()}).sum().backward()
            for total, parameter in zip(squares, lone.parameters(), strict=True):
                total += parameter.grad.square()  # type: ignore[union-attr]

    passes = compare(
        {
            "SSD importance, 128 samples": lambda: importance.accumulate(
                some | {"forget": torch.arange(128) < 13}
            ),
            "one backward per sample, 32 samples": one_by_one,
            "importance by a loop, 32 samples": loop_with_squares,
        }
    )
    per_sample = {
        "SSD importance": passes["SSD importance, 128 samples"] / 128,
        "one backward per sample": passes["one backward per sample, 32 samples"] / 32,
        "the same importance by a loop": passes["importance by a loop, 32 samples"] / 32,
    }
    results = {
        "seconds_per_step_of_128_images": steps,
        "ratio_to_lora_fine_tuning": {name: value / bound for name, value in steps.items()},
        "seconds_per_sample": per_sample,
        "ssd_speedup": {
            name: value / per_sample["SSD importance"] for name, value in per_sample.items()
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    text = json.dumps(results, indent=1)
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / "step_cost.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
