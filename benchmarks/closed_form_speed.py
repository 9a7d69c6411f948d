"""Time and size of a closed-form edit, against one dense inverse per layer, in one run.

    python benchmarks/closed_form_speed.py          # about a minute on one core
    python benchmarks/closed_form_speed.py --unet   # also through diffusers, on a whole UNet

Random weights in the shapes of the real networks and random embeddings; one or five sentences per
concept, 20 preserved prompts and the empty one, last token only. Both sides compute in the same
precision: the systems in float64. The dense side is written as usual,
``A = lam I + C^T C + p P^T P``, its inverse, and
``W_new = (lam W + (G W^T)^T C + p (P W^T)^T P) A^-1``, once per layer as in public code; every
distinct shape is timed and multiplied by its count. Ours solves once and gives the LoRA factors of
every layer.

Writes `benchmarks/results/closed_form_speed.md`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmforget.methods.closed_form import solve, times
from mmforget.models.weight_edit import WeightEdit

ROOT = Path(__file__).resolve().parents[1]
SENTENCES, PRESERVED, RIDGE, KEEP = 5, 20, 1e-3, 0.1
CONCEPTS = ((1, 1), (1, SENTENCES), (10, SENTENCES), (100, SENTENCES))
"""Numbers of concepts, and of sentences for each."""


def sd15() -> list[tuple[int, int]]:
    """Shapes (out, in) of the 32 keys and values: 5, 5, 5 and 1 attentions."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    return [(width, 768) for width in widths for _ in range(2)]


def sdxl() -> list[tuple[int, int]]:
    """Shapes of the 140 keys and values, without the pooled layer."""
    widths = [640] * 10 + [1280] * 60
    return [(width, 2048) for width in widths for _ in range(2)]


POOLED = (1280, 1280)
"""Text columns of SDXL's `add_embedding.linear_1`."""

Group = tuple[list[Tensor], Tensor, Tensor, Tensor]


def rows(count: int, width: int, draw: torch.Generator) -> Tensor:
    """Rows with a common part, as text embeddings have it."""
    common = torch.randn(1, width, generator=draw, dtype=torch.float64)
    return common + torch.randn(count, width, generator=draw, dtype=torch.float64)


def ridge(erase: Tensor) -> float:
    return RIDGE * float(erase.square().sum(1).mean())


def ours(groups: list[Group]) -> list[tuple[Tensor, Tensor]]:
    factors = []
    for weights, erase, guide, keep in groups:
        solution = solve(erase, guide, keep, ridge(erase), 1.0, KEEP)
        left, right = solution.compressed()
        right = right.float()  # one tensor that all layers share
        factors += [(times(weight, left), right) for weight in weights]
    return factors


def dense(weight: Tensor, erase: Tensor, guide: Tensor, keep: Tensor) -> Tensor:
    lam, w = ridge(erase), weight.double()
    a = lam * torch.eye(erase.shape[1], dtype=w.dtype) + erase.T @ erase + KEEP * keep.T @ keep
    right = lam * w + (guide @ w.T).T @ erase + KEEP * (keep @ w.T).T @ keep
    return right @ torch.linalg.inv(a)


def seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


def measure(name: str, shapes: list[tuple[int, int]], pooled: bool) -> list[list[str]]:
    draw = torch.Generator().manual_seed(0)
    table = []
    stored = {s: torch.randn(s, generator=draw) / s[1] ** 0.5 for s in {*shapes, POOLED}}
    for count, sentences in CONCEPTS:
        groups: list[Group] = []
        for wanted in [shapes, *([[POOLED]] if pooled else [])]:
            width, n = wanted[0][1], count * sentences
            erase, keep = rows(n, width, draw), rows(PRESERVED + 1, width, draw)
            guide = keep[:1].expand(n, -1)
            groups.append(([stored[shape] for shape in wanted], erase, guide, keep))
        repeats = 3 if count < 100 else 1
        fast = seconds(lambda groups=groups: ours(groups), repeats)
        slow, worst = 0.0, 0.0
        for weights, erase, guide, keep in groups:
            for shape, number in Counter(tuple(w.shape) for w in weights).items():
                weight = stored[shape]
                result: list[Tensor] = []
                args = (weight, erase, guide, keep)
                slow += number * seconds(lambda a=args, r=result: r.append(dense(*a)), 1)
                ((up, down),) = ours([([weight], erase, guide, keep)])
                worst = max(worst, float((weight + up @ down - result[-1]).abs().max()))
        edit = WeightEdit("unet", {str(n): pair for n, pair in enumerate(ours(groups))})
        lora = sum(t.numel() * 4 for pair in edit.factors.values() for t in pair)
        whole = sum(w.numel() * 4 for weights, *_ in groups for w in weights)
        table.append(
            [
                name,
                f"{count} × {sentences}",
                f"{fast:.3f}",
                f"{slow:.2f}",
                f"{slow / fast:.0f}",
                f"{lora / 1e6:.2f}",
                f"{whole / lora:.0f}",
                f"{edit.size_bytes / 1e6:.2f}",
                f"{whole / edit.size_bytes:.0f}",
                f"{worst:.1e}",
            ]
        )
        print(*table[-1], flush=True)
    return table


def through_diffusers() -> float:
    """Largest difference between a LoRA loaded by diffusers and the dense edit, SD-1.5's UNet."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(cross_attention_dim=768).eval()
    draw = torch.Generator().manual_seed(1)
    erase, keep = rows(SENTENCES, 768, draw), rows(PRESERVED + 1, 768, draw)
    names = [n for n, m in network.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(names) == 32
    weights = [network.get_parameter(f"{name}.weight").detach() for name in names]
    factors = ours([(weights, erase, keep[:1].expand(SENTENCES, -1), keep)])
    edit = WeightEdit("unet", dict(zip(names, factors, strict=True)))
    latents = torch.randn(1, 4, 32, 32, generator=draw)
    states = torch.cat([keep[:5], erase]).float()[None]
    time_ = torch.tensor(500)

    def answer() -> Tensor:
        with torch.no_grad():
            found: Tensor = network(latents, time_, states, return_dict=False)[0]
        return found

    plain = answer()
    with tempfile.TemporaryDirectory() as folder:
        edit.save_lora(folder)
        network.load_lora_adapter(folder, prefix="unet", adapter_name="edit", use_safetensors=True)
    lora = answer()
    network.disable_adapters()
    assert torch.equal(answer(), plain), "switched off, the LoRA must leave no trace"
    network.delete_adapters("edit")
    edit.apply(network)
    difference = float((answer() - lora).abs().max())
    print(f"UNet: edit moves the output by {float((plain - lora).abs().max()):.2g}, "
          f"LoRA against dense {difference:.1e}")  # fmt: skip
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", action="store_true", help="also on a whole UNet, 3.4 GB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "network", "concepts × sentences", "ours s", "dense s", "times faster", "LoRA MB",
        "times smaller", "edit MB", "times smaller", "largest difference",
    ]  # fmt: skip
    table = measure("SD 1.5", sd15(), False) + measure("SDXL", sdxl(), True)
    lines = ["# Closed-form edits: one solve against one dense inverse per layer", ""]
    lines += ["`python benchmarks/closed_form_speed.py`, CPU seconds on one thread, torch "
              f"{torch.__version__}. The dense times of equal shapes are measured once and "
              "multiplied by their count. LoRA: the file for other programs; edit: ours, where "
              "layers share a factor; both against the dense matrices in float32. Differences are "
              "those of weights of about 1 / sqrt(inputs).", ""]  # fmt: skip
    lines += ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *table)]
    if arguments.unet:
        difference = through_diffusers()
        lines += ["", "Output of a whole SD-1.5-sized UNet (random weights), LoRA loaded by "
                  f"diffusers against the dense edit: {difference:.1e}."]  # fmt: skip
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "closed_form_speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
