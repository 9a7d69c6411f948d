"""Cost of a forgetting step on a detector over a plain fine-tuning step, in one run.

    python benchmarks/detector_step.py

Both see the same sixteen forget and sixteen retain images with the same boxes and train the same
adapters (of the methods that train all weights: all weights); plain fine-tuning minimises the
detector's own loss. The steps take turns, and medians of processor time of one thread are compared
(limit: 1.2). The library's own loss over the same batch is given beside it. Writes
`benchmarks/results/detector_step.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DETECTOR = ROOT / "mmforget/assets/digit_world/detector"
REPEATS, IMAGES, LIMIT = 25, 16, 1.2


def compare(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median processor seconds of each step; the steps take turns, so that load hits them alike."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    from mmforget import (
        DigitScenes,
        ForgetRequest,
        GSLoRA,
        GSLoRAPlusPlus,
        NegGradPlus,
        SalUn,
        load_detector,
    )
    from mmforget.methods.base import joined

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DigitScenes(scenes=400, eval_scenes=8, batch_size=IMAGES)
    data.request(ForgetRequest(classes=("seven",)))
    batch = {
        role: data.subset("train", role)[list(range(IMAGES))]  # type: ignore[arg-type]
        for role in ("forget", "retain")
    }
    both, _ = joined(batch)
    model = load_detector(DETECTOR)

    def stepping(method: Any, loss: Callable[[Any], torch.Tensor]) -> Callable[[], None]:
        method.bind(data)
        method.model.train()
        for module in method.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        optimizer = torch.optim.AdamW(method.parameter_groups(), lr=1e-6)

        def step() -> None:
            optimizer.zero_grad()
            loss(method).backward()
            optimizer.step()

        return step

    def forgetting(method: Any) -> torch.Tensor:
        return torch.stack(list(method.losses(batch).values())).sum()

    def fine_tuning(method: Any) -> torch.Tensor:
        return method.model.loss(both).mean()  # type: ignore[no-any-return]

    def library(method: Any) -> torch.Tensor:
        kind = method.model.kind
        objects = method.model.objects(both)
        targets = kind._targets(both["image"], both["extent"], objects)
        inputs = kind._inputs(both["image"], both["extent"])
        method.model.network.config.auxiliary_loss = False
        method.model.network.eval()  # no denoised objects, as in the forgetting step
        return method.model.network(**inputs, labels=targets).loss  # type: ignore[no-any-return]

    def prototypes() -> GSLoRAPlusPlus:
        method = GSLoRAPlusPlus(model, prototype_data="head")
        method.compute_prototypes()
        return method

    adapters = compare(
        {
            "plain fine-tuning": stepping(GSLoRA(model), fine_tuning),
            "the library's own loss": stepping(GSLoRA(model), library),
            "GS-LoRA": stepping(GSLoRA(model), forgetting),
            "GS-LoRA++": stepping(prototypes(), forgetting),
        }
    )
    whole = compare(
        {
            "plain fine-tuning": stepping(NegGradPlus(model), fine_tuning),
            "NegGrad+": stepping(NegGradPlus(model), forgetting),
            "SalUn": stepping(SalUn(model), forgetting),
        }
    )
    lines = [
        "# A forgetting step on a detector over plain fine-tuning",
        "",
        f"`python benchmarks/detector_step.py`: {2 * IMAGES} digit scenes, RT-DETR of 0.7 million "
        f"parameters, medians of {REPEATS} alternating steps, processor time of one thread, torch "
        f"{torch.__version__}. Limit: {LIMIT}.",
        "",
        "| trained | step | seconds | over plain fine-tuning |",
        "|---|---|---|---|",
    ]
    for trained, found in (("adapters", adapters), ("all weights", whole)):
        bound = found["plain fine-tuning"]
        lines += [
            f"| {trained} | {name} | {value:.3f} | {value / bound:.2f} |"
            for name, value in found.items()
        ]
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks/results/detector_step.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
