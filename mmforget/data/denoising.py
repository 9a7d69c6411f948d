"""Denoising problems with their teachers' answers: what gradient methods of diffusion train on.

Every method that fine-tunes a denoiser against a frozen teacher can be written as regression: given
a noisy picture, a time and a prompt, predict what some combination of the teacher's outputs says.
The teacher's outputs do not change during training, so they are computed once, for pictures as the
teacher itself produces them, and a training step needs no teacher at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmforget.errors import ConfigurationError
from mmforget.models.base import PromptEmbedding
from mmforget.seeds import generator

LATENTS_AT_ONCE = 16384
"""Latent positions that are sampled together by default: four pictures of Stable Diffusion 1."""


class DenoisingRecords(Dataset[dict[str, Tensor]]):
    """Noisy latents, times, prompts and the outputs that the student shall learn.

    Args:
        noisy: (N, C, h, w) network inputs.
        time: (N,) in the scheduler's units.
        target: (N, C, h, w) wanted outputs.
        prompt: (N,) int64, index into the prompts.
        prompts: texts.
        passes: samples that went through the network to make the records.

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
        passes: int = 0,
    ) -> None:
        sizes = {len(noisy), len(time), len(target), len(prompt)}
        if len(sizes) != 1 or not len(noisy):
            raise ConfigurationError(
                f"denoising records have {sorted(sizes)} rows; all parts need the same number, "
                "at least one"
            )
        self.noisy, self.time, self.target, self.prompt = noisy, time, target, prompt
        self.prompts = tuple(prompts)
        self.passes = passes

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
            sum(part.passes for part in parts),
        )


def spread(groups: Sequence[Sequence[str]], total: int) -> dict[tuple[int, int], int]:
    """Share out pictures among words and their sentences, as evenly as the total allows.

    Every word comes up before any comes up twice, and neighbouring words begin with different
    sentences, so that few pictures still show all words and all sentences.

    Args:
        groups: per word its sentences.
        total: pictures in all, at least 1.

    Returns:
        Pictures per (word, sentence), without those that get none.
    """
    counts: dict[tuple[int, int], int] = {}
    for number in range(total):
        turn, word = divmod(number, len(groups))
        place = (word, (turn + word) % len(groups[word]))
        counts[place] = counts.get(place, 0) + 1
    return counts


class Picture(NamedTuple):
    """One picture that a model makes for its own records: which prompt, and its number."""

    prompt: int
    number: int


def dealt(prompts: Sequence[str], count: int | Sequence[int]) -> list[Picture]:
    """Pictures to make: `count` of each prompt, one number for all or one per prompt."""
    counts = [count] * len(prompts) if isinstance(count, int) else count
    return [
        Picture(index, number)
        for index, several in zip(range(len(prompts)), counts, strict=True)
        for number in range(several)
    ]


@torch.no_grad()
def trajectory_records(
    model: Any,
    prompts: Sequence[str],
    target: Callable[..., Tensor],
    count: int | Sequence[int],
    steps: int,
    guidance: float,
    seed: int,
    student: Sequence[str] | None = None,
    further: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> DenoisingRecords:
    """Sample with a frozen model and keep every step with the two predictions guidance made.

    A distilled model (FLUX) has guidance as an input. It is 1 here for all predictions, and the
    unconditional one is that for the empty text, which costs a pass of its own.

    Args:
        model: a `DiffusionGenerator`.
        prompts: what is sampled.
        target: from (conditional, unconditional, index of the prompt) to the wanted output; with
            `further`, the prediction for the further text comes last.
        count: trajectories per prompt, one number for all or one per prompt.
        steps: sampling steps.
        guidance: scale of the guidance that steers the trajectories.
        seed: of the starting noise.
        student: the prompts that the student is given, if others than those sampled.
        further: one text per prompt whose prediction `target` needs besides.
        batch_size: trajectories at a time; by default `LATENTS_AT_ONCE`.

    Returns:
        ``sum(count) * steps`` records in single precision on the CPU.
    """
    model.require_full_precision("sampling trajectories")
    table, empty = model.encode(list(prompts)), model.unconditional()
    others = None if further is None else model.encode(list(further))
    scale = 1.0 if model.distilled else guidance
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    passes = 0
    for part in _parts(model, dealt(prompts, count), batch_size):
        which = torch.tensor([picture.prompt for picture in part])

        def record(step: Any, which: Tensor = which) -> None:
            nonlocal passes
            plain, rows = step.unconditional, [step.conditional, step.unconditional]
            if model.distilled:
                plain = model.predict(step.noisy, step.time, _repeated(empty, len(which)))
                rows[1] = plain
            if others is not None:
                rows.append(model.predict(step.noisy, step.time, others[which]))
            passes += len(rows) * len(which)
            goal = torch.stack(
                [
                    target(*row[:2], int(index), *row[2:])
                    for index, *row in zip(which, *rows, strict=True)
                ]
            )
            kept.append(
                (step.noisy.float().cpu(), step.time.float().cpu(), goal.float().cpu(), which)
            )

        _sample(model, prompts, part, table[which], empty, steps, scale, seed, record)
    noisy, time, goal, which = (torch.cat(column) for column in zip(*kept, strict=True))
    return DenoisingRecords(noisy, time, goal, which, student or prompts, passes)


class MadePictures(NamedTuple):
    """Pictures as latents, made by a model or encoded from given ones.

    Attributes:
        latents: (N, C, h, w) single precision, on the CPU.
        which: (N,) int64, index of each picture's prompt.
        prompts: texts.
        passes: samples that went through the network.
    """

    latents: Tensor
    which: Tensor
    prompts: tuple[str, ...]
    passes: int


@torch.no_grad()
def made_pictures(
    model: Any,
    prompts: Sequence[str],
    count: int | Sequence[int],
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int | None = None,
) -> MadePictures:
    """Let a frozen model make pictures; they stay latents.

    Args:
        model: a `DiffusionGenerator`.
        prompts: what is drawn.
        count: pictures per prompt, one number for all or one per prompt.
        steps: sampling steps.
        guidance: guidance scale.
        seed: of the starting noise.
        batch_size: pictures at a time; by default `LATENTS_AT_ONCE`.
    """
    model.require_full_precision("making pictures")
    table, empty = model.encode(list(prompts)), model.unconditional()
    pictures = dealt(prompts, count)
    made = []
    for part in _parts(model, pictures, batch_size):
        rows = table[torch.tensor([picture.prompt for picture in part])]
        made.append(_sample(model, prompts, part, rows, empty, steps, guidance, seed).float().cpu())
    guided = guidance > 1 and not model.distilled
    return MadePictures(
        torch.cat(made),
        torch.tensor([picture.prompt for picture in pictures]),
        tuple(prompts),
        len(pictures) * steps * (2 if guided else 1),
    )


@torch.no_grad()
def noised_records(
    model: Any,
    pictures: MadePictures,
    times: int,
    seed: int,
    teacher: Sequence[str] | None = None,
    student: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> DenoisingRecords:
    """Mix pictures with noise at random times.

    Args:
        model: a `DiffusionGenerator`.
        pictures: see `made_pictures`.
        times: records per picture.
        seed: of times and noise.
        teacher: one text per prompt, whose prediction by the frozen model is the wanted output;
            None takes the truth, which is the noise or velocity that was mixed in.
        student: one text per prompt that the student is given; by default the prompts themselves.
        batch_size: records at a time; by default `LATENTS_AT_ONCE`.

    Returns:
        ``N * times`` records in single precision on the CPU.
    """
    table = None if teacher is None else model.encode(list(teacher))
    device, dtype = next(model.network.parameters()).device, model.dtype_of_network
    rows = [(row, k) for row in range(len(pictures.latents)) for k in range(times)]
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for part in _parts(model, rows, batch_size):
        index = torch.tensor([row for row, _ in part])
        draws = [
            generator(seed, "noised", pictures.prompts[int(pictures.which[row])], row, k)
            for row, k in part
        ]
        time = torch.cat([model.draw_times(1, draw) for draw in draws]).to(device)
        latents = pictures.latents[index].to(device, dtype)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=draw) for draw in draws])
        noise = noise.to(latents)
        noisy, which = model.noised(latents, noise, time), pictures.which[index]
        if table is None:
            goal = model.target(latents, noise, time)
        else:
            goal = model.predict(noisy, time, table[which])
        kept.append((noisy.float().cpu(), time.float().cpu(), goal.float().cpu(), which))
    noisy, time, goal, which = (torch.cat(column) for column in zip(*kept, strict=True))
    passes = 0 if table is None else len(rows)
    return DenoisingRecords(noisy, time, goal, which, student or pictures.prompts, passes)


def _parts(model: Any, rows: Sequence[Any], size: int | None) -> Iterator[Sequence[Any]]:
    if not rows:
        raise ConfigurationError("no picture is to be made; give at least one prompt and number")
    _, height, width = model.latent_shape
    size = size or min(64, max(1, LATENTS_AT_ONCE // (height * width)))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _sample(
    model: Any,
    prompts: Sequence[str],
    part: Sequence[Picture],
    embedding: PromptEmbedding,
    empty: PromptEmbedding,
    steps: int,
    guidance: float,
    seed: int,
    record: Callable[[Any], None] | None = None,
) -> Tensor:
    noise = torch.cat([model.noise([prompts[p]], 1, seed, first=number) for p, number in part])
    draws = [generator(seed, "sampler", prompts[p], number) for p, number in part]
    found: Tensor = model.sample(
        noise, embedding, empty, steps=steps, guidance=guidance, record=record, draws=draws
    )
    return found


def _repeated(embedding: PromptEmbedding, count: int) -> PromptEmbedding:
    rows: PromptEmbedding = embedding[torch.zeros(count, dtype=torch.long)]
    return rows
