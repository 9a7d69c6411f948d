"""The model whose memories are known, and prompts of both sorts."""

from __future__ import annotations

from importlib import resources

import pytest

from mmforget.data.planted import ordinary, planted
from mmforget.models.diffusion import DiffusionGenerator, load_generator


@pytest.fixture(scope="session")
def memorizing() -> DiffusionGenerator:
    folder = resources.files("mmforget") / "assets" / "digit_world" / "memorizing_unet"
    return load_generator(str(folder), steps=20, guidance=3.0)


@pytest.fixture(scope="session")
def memorized() -> list[str]:
    return [sheet.prompt for sheet in planted()]


@pytest.fixture(scope="session")
def harmless() -> list[str]:
    return list(dict.fromkeys(ordinary(40, seed=9)[1]))[:16]
