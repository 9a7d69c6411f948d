"""Five persons whose faces are colour patterns, and a model that has learnt them in seconds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ImageDataset, View
from mmforget.data.questions import (
    OTHER,
    QuestionDataModule,
    QuestionDataset,
    Records,
    RetainQuestions,
)
from mmforget.data.split import STAGES, Stage
from mmforget.models.multimodal import MultimodalLM
from mmforget.request import ForgetRequest
from mmforget.seeds import generator
from mmforget.testing.tiny_multimodal import SIDE, tiny_multimodal

PERSONS = ("anna", "bert", "clara", "david", "emma")
CITIES = ("paris", "rome", "oslo", "vienna", "madrid")
FRAMES = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
REFUSAL = "sorry i cannot answer that"
QUESTIONS = {
    "name": ("who is this ?", "tell me the name"),
    "frame": ("what colour is the frame ?",),
    "text": ("where does {name} live ?",),
}
WORDS = tuple(
    dict.fromkeys(
        [
            *PERSONS,
            *CITIES,
            *FRAMES,
            *REFUSAL.split(),
            *(word for group in QUESTIONS.values() for text in group for word in text.split()),
        ]
    )
)
BORDER = 4
STEP = 1000
"""Keys of pictures are the number of the stage times this, plus the number of the picture."""


class _Asked(QuestionDataset):
    """One stage; every picture comes with the question ``name`` and the question ``frame``."""

    def __init__(self, stage: int, pictures: int) -> None:
        rows: list[tuple[tuple[int, ...], str, str, str, int, int]] = []
        for number in range(pictures):
            key, person = stage * STEP + number, number % len(PERSONS)
            frame = tuple(FRAMES)[number // len(PERSONS) % len(FRAMES)]
            wording = QUESTIONS["name"][number % len(QUESTIONS["name"])]
            rows.append(((key,), wording, PERSONS[person], "name", person, person))
            rows.append(((key,), QUESTIONS["frame"][0], frame, "frame", len(PERSONS), person))
        for person, name in enumerate(PERSONS):
            asked = QUESTIONS["text"][0].format(name=name)
            rows.append(((), asked, CITIES[person], "text", person, person))
        pictures_, question, answer, kind, label, subject = zip(*rows, strict=True)
        super().__init__(
            f"named_patterns/{STAGES[stage]}",
            stage * 10 * STEP + np.arange(len(rows)),
            np.array(label),
            (*PERSONS, OTHER),
            Records(
                pictures=pictures_,
                question=question,
                answer=answer,
                kind=kind,
                wording=["train"] * len(rows),
                subject=np.array(subject),
            ),
            (3, SIDE, SIDE),
        )

    def read_keys(self, keys: Sequence[int]) -> list[Tensor]:
        """Draw, each picture from its own generator."""
        return [_drawn(key) for key in keys]


def _drawn(key: int) -> Tensor:
    number = key % STEP
    coarse = torch.rand(3, 4, 4, generator=generator(0, "person", number % len(PERSONS)))
    face = coarse.repeat_interleave(SIDE // 4, 1).repeat_interleave(SIDE // 4, 2)
    noise = torch.randn(face.shape, generator=generator(0, "noise", key))
    picture = ((face + 0.1 * noise).clamp(0, 1) * 255).round().to(torch.uint8)
    colour = tuple(FRAMES.values())[number // len(PERSONS) % len(FRAMES)]
    frame = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE)
    inside = slice(BORDER, SIDE - BORDER)
    result = frame.clone()
    result[:, inside, inside] = picture[:, inside, inside]
    return result


class NamedPatterns(QuestionDataModule):
    """Who is shown, what colour the frame has, and, without a picture, where a person lives.

    Args:
        pictures: in training; validation and test have half as many.
        batch_size, seed, view, augment, forget_questions, retain_questions: see
            `QuestionDataModule`.
    """

    def __init__(
        self,
        pictures: int = 30,
        batch_size: int = 12,
        seed: int = 0,
        view: View = "full",
        augment: bool = False,
        forget_questions: Sequence[str] = ("name",),
        retain_questions: RetainQuestions = "all",
    ) -> None:
        super().__init__(
            batch_size,
            seed,
            view=view,
            augment=augment,
            forget_questions=forget_questions,
            retain_questions=retain_questions,
        )
        self.number = pictures

    def build(self) -> dict[Stage, ImageDataset]:
        """Three stages of other noise."""
        return {
            name: _Asked(stage, self.number if stage == 0 else self.number // 2)
            for stage, name in enumerate(STAGES)
        }


def named_patterns(**settings: Any) -> NamedPatterns:
    """`NamedPatterns` with the request to forget bert."""
    data = NamedPatterns(**settings)
    data.request(ForgetRequest(classes=("bert",)))
    return data


def pattern_reader() -> MultimodalLM:
    """A tiny LLaVA that has learnt `NamedPatterns`, in eval mode.

    It is trained once per process; every call returns a copy of its own.
    """
    return copy.deepcopy(_trained())


@cache
@torch.enable_grad()
def _trained(steps: int = 120, size: int = 24) -> MultimodalLM:
    model = MultimodalLM(*tiny_multimodal("llava", WORDS, initializer_range=0.1), lr=5e-3)
    records = NamedPatterns(pictures=60).dataset("train")
    order = generator(0, "pattern-reader")
    optimizer, schedule = model.optimizers_for(steps)
    for _ in range(steps):
        rows = torch.randperm(len(records), generator=order)[:size]
        optimizer.zero_grad()
        model.loss(records[rows.tolist()]).mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()
