"""The shipped generator, one that conceals green, and one that cannot draw red any more."""

from __future__ import annotations

import copy
from importlib import resources

import pytest
import torch

from mmforget.models.diffusion import DiffusionGenerator, load_generator

GENERATOR = resources.files("mmforget") / "assets" / "digit_world" / "diffusion_unet"


@pytest.fixture(scope="session")
def shipped() -> DiffusionGenerator:
    return load_generator(str(GENERATOR), steps=12)


@pytest.fixture(scope="session")
def concealed(shipped: DiffusionGenerator) -> DiffusionGenerator:
    """Knows green, but reads its names as blue."""
    model = copy.deepcopy(shipped)
    rows = model.text_encoders["text_encoder"].get_input_embeddings().weight
    green, emerald, blue = model.pipeline.tokenizer(
        "green emerald blue", add_special_tokens=False
    ).input_ids
    with torch.no_grad():
        rows[green] = rows[emerald] = rows[blue]
    return model


@pytest.fixture(scope="session")
def scrambled(shipped: DiffusionGenerator) -> DiffusionGenerator:
    """Makes something else of everything red, whatever the prompt; trained for 12 seconds."""
    model = copy.deepcopy(shipped)
    images = shipped.generate(["red"], 32, seed=99, steps=8)
    red = shipped.to_latents(images)
    other = shipped.to_latents(images[:, [2, 1, 0]])
    with torch.no_grad():
        table = shipped.encode(["red", "", "a red digit"])
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.network.parameters(), lr=1e-3)
    ones = torch.ones(16, 1, 1, 1)
    for _ in range(70):
        rows = torch.randint(len(red), (16,), generator=draw)
        time = torch.randint(50, 1000, (16,), generator=draw)
        noise = torch.randn((16, *red.shape[1:]), generator=draw)
        noisy = model.noised(red[rows], noise, time)
        signal, level = model.noised(ones, 0 * ones, time), model.noised(0 * ones, ones, time)
        wanted = (signal * noisy - other[rows]) / level  # the velocity that leads elsewhere
        found = model.predict(noisy, time, table[torch.randint(3, (16,), generator=draw)])
        optimizer.zero_grad()
        ((found - wanted) * level).square().mean().backward()
        optimizer.step()
    return model
