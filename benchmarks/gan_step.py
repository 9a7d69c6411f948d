"""Cost of a step of Text-to-Unlearn over its bound, in one run.

    python benchmarks/gan_step.py

The bound is what no such method can do without, for as many pictures: one pass of the frozen
generator, one of the trained one, one of the CLIP model, and one backward pass to the trained
weights. Both are measured in turn, many times, and the medians are compared; processor time of one
thread. Sorting the pool and training the mapper, which are done once, are given beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS, STEPS = 9, 2


def seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    for _ in range(STEPS):
        action()
    return (time.process_time() - start) / STEPS


def main() -> None:
    from mmforget import ConceptSpec, TextToUnlearn, load_clip, load_gan
    from mmforget.data.digit_world import DIGITS
    from mmforget.erase import run_method

    torch.set_num_threads(1)
    clip = load_clip("digit_world")
    others = [digit for digit in DIGITS if digit != "seven"]
    for edits in (0, 200):
        method = TextToUnlearn(
            load_gan("gan"), ConceptSpec("seven"), clip, others, mapper_steps=edits
        )
        start = time.process_time()
        run_method(method, 1, progress=False)
        prepared = time.process_time() - start
        model: Any = method.model
        for name in method._names:
            model.network.get_parameter(name).requires_grad_(True)
        optimizer = torch.optim.Adam(model.parameters(), 1e-6)
        forget, retain = method.batch_size, method.retain_batch_size
        batch = {
            "forget": method.records["forget"][[row % 64 for row in range(forget)]],
            "retain": method.records["retain"][list(range(retain))],
        }
        pictures = forget + retain * (2 if edits else 1)
        latents = method.original.draw(pictures, 0)

        def step(method: Any = method, batch: Any = batch, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            torch.stack(list(method.losses(batch).values())).sum().backward()
            optimizer.step()

        def bound(
            method: Any = method, model: Any = model, latents: Any = latents,
            optimizer: Any = optimizer,
        ) -> None:  # fmt: skip
            optimizer.zero_grad()
            kept = method.kept(latents)
            images = model.synthesise(latents)
            margins = method.guide.margins(method.guide.embed(images))
            (margins.sum() + (images - kept).square().sum()).backward()
            optimizer.step()

        step(), bound()
        pairs = [(seconds(step), seconds(bound)) for _ in range(ROUNDS)]
        own, least = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        print(
            f"{'with' if edits else 'without'} edits, {pictures} pictures: step "
            f"{1e3 * own:.0f} ms, bound {1e3 * least:.0f} ms, ratio {ratio:.2f}; before the first "
            f"step {prepared:.1f} s"
        )


if __name__ == "__main__":
    main()
