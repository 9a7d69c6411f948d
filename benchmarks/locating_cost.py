"""What locating costs: time against the bare sampling that it rides on, and memory, in one run.

    python benchmarks/locating_cost.py              # some minutes on one core
    python benchmarks/locating_cost.py --wide       # also a wider UNet with random weights

Both sides draw the same pictures from the same noises in the same batches; one of them has the
pre-hooks of `mmforget.methods.activation_statistics` on every feed-forward output layer. They are
run in turns, so that a busy machine slows both, and compared by the median over the turns of the
ratio of processor times. Memory is the peak of the process after locating on more and more prompts;
the sums themselves are counted in bytes.

Writes `benchmarks/results/locating_cost.md`. Exits with an error if a ratio is above 1.1.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mmforget.methods.activation_statistics import ActivationStatistics, collect
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.memory_layers import memory_layers
from mmforget.seeds import generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "mmforget" / "assets" / "digit_world"
LIMIT, BATCH, TURNS = 1.1, 8, 15
COUNTS = (16, 64, 256)
"""Numbers of prompts for the memory."""


def wide_unet() -> DiffusionGenerator:
    """A UNet of 54 million random parameters on 32x32 latents."""
    from diffusers import UNet2DConditionModel

    pipeline = tiny_pipeline("sd")
    torch.manual_seed(0)
    network: Any = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(160, 320, 480),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=40,
    )
    pipeline.register_modules(unet=network.eval())
    return DiffusionGenerator(pipeline, steps=2)


@torch.no_grad()
def bare(model: DiffusionGenerator, prompts: list[str], batch: int) -> None:
    """Sampling as locating does it, without hooks."""
    empty = model.unconditional()
    for start in range(0, len(prompts), batch):
        keys = range(start, min(start + batch, len(prompts)))
        embedding = model.encode(prompts[start : start + batch])
        draws = [generator(0, "locating", key) for key in keys]
        noise = torch.stack([torch.randn(model.latent_shape, generator=d) for d in draws])
        model.sample(
            noise,
            embedding,
            empty,
            draws=[generator(0, "locating sampler", key) for key in keys],
        )


def ratio(model: DiffusionGenerator, batch: int, turns: int) -> tuple[float, float, float]:
    """Median ratio, and median seconds of both sides."""
    layers, prompts = memory_layers(model), ["a"] * batch
    found: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        taken = [0.0, 0.0]
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            if side:
                collect(model, prompts, layers, batch_size=batch)
            else:
                bare(model, prompts, batch)
            taken[side] = time.process_time() - start
        if turn:  # the first turn warms up
            found.append((taken[0], taken[1]))
    return (
        statistics.median(mine / plain for plain, mine in found),
        statistics.median(plain for plain, _ in found),
        statistics.median(mine for _, mine in found),
    )


def size(found: ActivationStatistics) -> int:
    """Bytes of all sums."""
    return sum(
        t.numel() * t.element_size() for sums in found.squares.values() for t in sums.values()
    )


def memory(model: DiffusionGenerator) -> list[list[str]]:
    """Rows of prompts, bytes of the sums, peak of the process."""
    table = []
    for count in COUNTS:
        found = collect(model, ["a"] * count, memory_layers(model), batch_size=BATCH, first_steps=5)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        table.append([str(count), str(size(found)), f"{peak:.0f}"])
        print(*table[-1], flush=True)
    return table


def main() -> int:
    """Measure, write, and say whether the limit was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true", help="also a UNet of 54 million parameters")
    parser.add_argument("--turns", type=int, default=TURNS, help="repetitions of each side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {
        name: load_generator(ASSETS / name, steps=10, guidance=3.0)
        for name in ("memorizing_unet", "memorizing_transformer")
    }
    lines = [
        "# Cost of locating",
        "",
        "`python benchmarks/locating_cost.py`: processor seconds on one thread, torch "
        f"{torch.__version__}; {arguments.turns} turns, median. Hooks on all feed-forward output "
        "layers and all of 10 sampling steps.",
        "",
        "| model | pictures | bare s | with statistics s | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    worst = 0.0
    cases = [(name, model, BATCH, arguments.turns) for name, model in models.items()]
    cases += [("one picture, memorizing_unet", models["memorizing_unet"], 1, arguments.turns)]
    if arguments.wide:
        cases.append(("wide UNet, random weights", wide_unet(), 2, 5))
    for name, model, batch, turns in cases:
        found, plain, mine = ratio(model, batch, turns)
        worst = max(worst, found)
        lines.append(f"| {name} | {batch} | {plain:.3f} | {mine:.3f} | {found:.3f} |")
        print(lines[-1], flush=True)
    lines += ["", "| prompts | bytes of the sums | peak MB of the process |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in memory(models["memorizing_unet"])]
    lines += ["", f"Limit {LIMIT}: " + ("kept." if worst <= LIMIT else f"missed ({worst:.3f}).")]
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "locating_cost.md").write_text("\n".join(lines) + "\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
