"""What a step of ESD costs: time beside plain training, and memory beside a second denoiser.

    python benchmarks/esd_step.py

* Time, on the shipped UNet: a step on records against a plain training step with the same batch
  and the same trained weights (target: at most 1.2), and against a step that samples its own noisy
  picture and asks a teacher, as public code does. The steps take turns, and medians are compared.
* Memory, on a random UNet of about 110 million weights: peak resident memory of a process that
  trains ESD-x in place, above that of a process which has only built the model, against a second
  denoiser and one step's activations (target: below). Every figure is of a process of its own.

Writes `benchmarks/results/esd_step.md`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from mmforget.concept import ConceptSpec
from mmforget.methods.esd import ESD
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.testing.conformance import quiet_trainer

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "mmforget/assets/digit_world/diffusion_unet"
REPEATS = 15
BATCH = 8
SAMPLING = 20
MIB = 2**20


# ---- time ---------------------------------------------------------------------------------------


def compare(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each step; the steps take turns, so that load hits them alike."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def times() -> dict[str, float]:
    model = load_generator(SHIPPED)
    concept = ConceptSpec("seven", templates=("the digit {}",))
    method = ESD(model, concept, trajectories=8, steps=SAMPLING, batch_size=BATCH)
    quiet_trainer(max_steps=1).fit(method)
    records = method.records["forget"]
    batch = {"forget": records[list(range(BATCH))]}
    trained = [p for p in method.model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-6)

    def finish(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    def with_records() -> None:
        finish(method.losses(batch)["forget"])

    noisy, when = batch["forget"]["noisy"], batch["forget"]["time"]
    embedding = model.encode(["the digit seven"])[torch.zeros(BATCH, dtype=torch.long)]
    empty, truth = model.unconditional(), torch.randn_like(noisy)

    def plain() -> None:
        found = method.model.predict(noisy, when, embedding)
        finish((found - truth).square().mean())

    draw = torch.Generator().manual_seed(0)

    def anew() -> None:
        # Up to a random step, as public code goes; the teacher's two predictions come last.
        stop = int(torch.randint(0, SAMPLING, (1,), generator=draw))
        noise = torch.randn(noisy.shape, generator=draw)
        last = []
        with torch.no_grad():
            scheduler, timesteps = model.schedule(SAMPLING, noise)
            latents = noise * scheduler.init_noise_sigma
            for number in range(stop + 1):
                both = type(embedding).cat([empty[torch.zeros(BATCH, dtype=torch.long)], embedding])
                scaled = scheduler.scale_model_input(latents, timesteps[number])
                found = model.predict(torch.cat([scaled] * 2), timesteps[number], both)
                without, conditional = found.chunk(2)
                last = [scaled, timesteps[number], conditional, without]
                guided = without + 3.0 * (conditional - without)
                latents = scheduler.step(guided, timesteps[number], latents, return_dict=False)[0]
        scaled, timestep, conditional, without = last
        found = method.model.predict(scaled, timestep, embedding)
        finish((found - (without - (conditional - without))).square().mean())

    return compare({"records": with_records, "plain": plain, "anew": anew}, REPEATS)


# ---- memory -------------------------------------------------------------------------------------


def large() -> DiffusionGenerator:
    """A pipeline with a denoiser of about 110 million random weights."""
    from diffusers import UNet2DConditionModel

    from mmforget.testing.tiny_pipelines import tiny_pipeline

    torch.manual_seed(0)
    pipeline = tiny_pipeline("sd")
    pipeline.unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(160, 448, 576),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=32,
    ).eval()
    return DiffusionGenerator(pipeline)


def resident(field: str) -> float:
    """Resident memory of this process in MiB, ``VmRSS`` now or ``VmHWM`` at its largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status; this needs Linux")


def memory(what: str) -> dict[str, float]:
    """Peak of one process that does one thing."""
    model = large()
    weights = sum(p.numel() * p.element_size() for p in model.network.parameters()) / MIB
    start = resident("VmRSS")
    concept = ConceptSpec("van gogh", templates=("{}",))
    if what == "esd":
        method = ESD(model, concept, copy=False, trajectories=2, steps=4, batch_size=2)
        quiet_trainer(max_steps=3).fit(method)
    elif what == "step":
        # Forward and backward with the trained weights of ESD-x, without a method.
        model.network.requires_grad_(False)
        for site in model.sites("cross_attention"):
            site.module.requires_grad_(True)
        noisy = torch.randn(2, 4, 16, 16)
        embedding = model.encode(["van gogh", "van gogh"])
        model.predict(noisy, torch.tensor([500, 500]), embedding).square().mean().backward()
    return {"weights": weights, "start": start, "peak": resident("VmHWM")}


def in_process(what: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, what], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---- the report ---------------------------------------------------------------------------------


def main() -> None:
    seconds = times()
    step, esd = in_process("step"), in_process("esd")
    activations = step["peak"] - step["start"]
    bound = 2 * esd["weights"] + activations
    used = esd["weights"] + esd["peak"] - esd["start"]
    lines = [
        "# Cost of an ESD step",
        "",
        "Made by `python benchmarks/esd_step.py` on one CPU thread; ratios of one run.",
        "",
        f"| step, batch {BATCH}, weights x | seconds | over plain | target |",
        "|---|---|---|---|",
        f"| plain training | {seconds['plain']:.3f} | 1.00 | |",
        f"| ESD on records | {seconds['records']:.3f} | "
        f"{seconds['records'] / seconds['plain']:.2f} | at most 1.20 |",
        f"| sampling anew at every step, {SAMPLING} steps | {seconds['anew']:.3f} | "
        f"{seconds['anew'] / seconds['plain']:.2f} | |",
        "",
        f"| memory, denoiser of {esd['weights']:.0f} MiB | MiB |",
        "|---|---|",
        f"| one step's activations and gradients, without a method | {activations:.0f} |",
        f"| two denoisers and one step | {bound:.0f} |",
        f"| ESD-x in place: denoiser, records, activations, gradients, optimizer | {used:.0f} |",
        f"| share | {used / bound:.2f} (target: below 1) |",
        "",
    ]
    text = "\n".join(lines)
    (ROOT / "benchmarks/results/esd_step.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        print(json.dumps(memory(sys.argv[1])))
    else:
        main()
