"""The shipped generator, and two that lost a colour: one conceals it, one cannot draw it."""

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
    """Makes blue of everything green, whatever the prompt; trained for half a minute."""
    model = copy.deepcopy(shipped)
    images = shipped.generate(["green"], 48, seed=99, steps=12)
    green = shipped.to_latents(images)
    blue = shipped.to_latents(images[:, [0, 2, 1]])
    with torch.no_grad():
        table = shipped.encode(["green", "emerald", "", "a green digit"])
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.network.parameters(), lr=1e-3)
    for _ in range(150):
        rows = torch.randint(len(green), (16,), generator=draw)
        time = torch.randint(50, 1000, (16,), generator=draw)
        noise = torch.randn((16, *green.shape[1:]), generator=draw)
        noisy = model.noised(green[rows], noise, time)
        ones = torch.ones(16, 1, 1, 1)
        signal, level = model.noised(ones, 0 * ones, time), model.noised(0 * ones, ones, time)
        wanted = (signal * noisy - blue[rows]) / level  # the velocity that leads to blue
        found = model.predict(noisy, time, table[torch.randint(4, (16,), generator=draw)])
        optimizer.zero_grad()
        ((found - wanted) * level).square().mean().backward()
        optimizer.step()
    return model
