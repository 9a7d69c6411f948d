"""Denoising problems with their teachers' answers: what gradient methods of diffusion train on.

Every method that fine-tunes a denoiser against a frozen teacher can be written as regression: given
a noisy picture, a time and a prompt, predict what some combination of the teacher's outputs says.
The teacher's outputs do not change during training, so they are computed once, for pictures as the
teacher itself produces them, and a training step needs no teacher at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmforget.errors import ConfigurationError


class DenoisingRecords(Dataset[dict[str, Tensor]]):
    """Noisy latents, times, prompts and the outputs that the student shall learn.

    Args:
        noisy: (N, C, h, w) network inputs.
        time: (N,) in the scheduler's units.
        target: (N, C, h, w) wanted outputs.
        prompt: (N,) int64, index into the prompts.
        prompts: texts.

    Raises:
        ConfigurationError: no records at all, or of different numbers.
    """

    def __init__(
        self,
        noisy: Tensor,
        time: Tensor,
        target: Tensor,
        prompt: Tensor,
        prompts: Sequence[str],
    ) -> None:
        sizes = {len(noisy), len(time), len(target), len(prompt)}
        if len(sizes) != 1 or not len(noisy):
            raise ConfigurationError(
                f"denoising records have {sorted(sizes)} rows; all parts need the same number, "
                "at least one"
            )
        self.noisy, self.time, self.target, self.prompt = noisy, time, target, prompt
        self.prompts = tuple(prompts)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.noisy)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """One batch; a negative position ``~p`` gives record p as padding, with weight 0.

        Returns:
            ``noisy``, ``time``, ``target``, ``prompt``, ``id`` (B,) and ``weight`` (B,).
        """
        given = np.asarray(positions, dtype=np.int64)
        index = torch.from_numpy(np.where(given < 0, ~given, given))
        return {
            "noisy": self.noisy[index],
            "time": self.time[index],
            "target": self.target[index],
            "prompt": self.prompt[index],
            "id": index,
            "weight": torch.from_numpy((given >= 0).astype(np.float32)),
        }

    @staticmethod
    def join(parts: Sequence[DenoisingRecords]) -> DenoisingRecords:
        """Concatenate, interleaved by row, so that every stretch holds all parts alike."""
        prompts: list[str] = []
        moved = []
        for part in parts:
            moved.append(part.prompt + len(prompts))
            prompts.extend(part.prompts)
        place = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts]).argsort(
            stable=True
        )
        return DenoisingRecords(
            torch.cat([part.noisy for part in parts])[place],
            torch.cat([part.time for part in parts])[place],
            torch.cat([part.target for part in parts])[place],
            torch.cat(moved)[place],
            prompts,
        )


@torch.no_grad()
def trajectory_records(
    model: Any,
    prompts: Sequence[str],
    target: Callable[[Tensor, Tensor, int], Tensor],
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    student: Sequence[str] | None = None,
    batch_size: int = 64,
) -> DenoisingRecords:
    """Sample with a frozen model and keep every step with the two predictions guidance made.

    Args:
        model: a `DiffusionGenerator`.
        prompts: what is sampled, `count` trajectories each.
        target: from (conditional, unconditional, index of the prompt) to the wanted output.
        count: trajectories per prompt.
        steps: sampling steps.
        guidance: scale of the guidance that steers the trajectories.
        seed: of the starting noise.
        student: the prompts that the student is given, if others than those sampled.
        batch_size: trajectories at a time.

    Returns:
        ``len(prompts) * count * steps`` records in single precision on the CPU.
    """
    model.require_full_precision("sampling trajectories")
    table, empty = model.encode(list(prompts)), model.unconditional()
    rows = [(index, number) for index in range(len(prompts)) for number in range(count)]
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        which = torch.tensor([index for index, _ in part])
        noise = torch.cat(
            [model.noise([prompts[index]], 1, seed, first=number) for index, number in part]
        )

        def record(step: Any, which: Tensor = which) -> None:
            goal = torch.stack(
                [
                    target(one, other, int(index))
                    for one, other, index in zip(
                        step.conditional, step.unconditional, which, strict=True
                    )
                ]
            )
            kept.append(
                (step.noisy.float().cpu(), step.time.float().cpu(), goal.float().cpu(), which)
            )

        model.sample(noise, table[which], empty, steps=steps, guidance=guidance, record=record)
    noisy, time, goal, which = (torch.cat(column) for column in zip(*kept, strict=True))
    return DenoisingRecords(noisy, time, goal, which, student or prompts)
