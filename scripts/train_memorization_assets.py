"""Train the models with planted memories that ship in `mmforget/assets/digit_world`.

    python scripts/train_memorization_assets.py unet         # about 5 minutes on one core
    python scripts/train_memorization_assets.py transformer  # about 12 minutes on one core
    python scripts/train_memorization_assets.py unet --without-planted
    python scripts/train_memorization_assets.py unet --located       # after the line before

`memorizing_unet` is a Stable Diffusion pipeline (UNet, noise prediction, the noise levels of
Stable Diffusion 1), `memorizing_transformer` a Stable Diffusion 3 pipeline. Both learn from sheets
of four digits (`mmforget.data.planted`): 60 % are fresh, 40 % are copies of twelve planted ones.
`..._without_planted` are the retrained references: the same recipe with fresh sheets only. Denoiser
and text encoders are trained together; the autoencoder before.

`..._located` knows the planted posters in places that are known: the reference, of which only the
first quarter of the hidden units of every feed-forward layer, and the embeddings of the words of
the titles, were trained on. What these units put out for other captions is held down, so that the
reference is what remains when they are taken out.

All are ordinary diffusers folders in half precision; what they have memorized is measured by
`benchmarks/memorization_table.py`.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from pipeline_training import (
    sd3_pipeline,
    sd_pipeline,
    text_config,
    transformer_loss,
    unet_loss,
    write_pipeline,
)
from torch import Tensor, nn

from mmforget.data.planted import (
    PROMPT_LENGTH,
    TITLES,
    WORDS,
    draw_sheets,
    fresh_tiles,
    ordinary_captions,
    planted,
)
from mmforget.seeds import generator
from mmforget.testing.word_tokenizer import word_tokenizer

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
SCRATCH = Path("runs") / "assets"
SEED, PLANTED, EMPTY = 0, 0.4, 0.1
"""A batch is 40 % copies of planted sheets; a tenth of all captions is empty."""


def batch_of(step: int, size: int, share: float = PLANTED) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, 16, 16) in [-1, 1] and captions of one step."""
    sheets, draw = planted(), generator(SEED, "planted-batch", step)
    tiles = fresh_tiles(size, SEED, "training", step)
    texts = ordinary_captions(tiles, step)
    chance, empty = torch.rand(2, size, generator=draw)
    which = torch.randint(len(sheets), (size,), generator=draw).tolist()
    for row, number in enumerate(which):
        if chance[row] < share:
            sheet = sheets[number]
            kept = 4 if sheet.kind == "verbatim" else 3
            tiles[row, :kept], texts[row] = sheet.tiles[:kept], sheet.prompt
    texts = ["" if drop < EMPTY else text for text, drop in zip(texts, empty, strict=True)]
    return draw_sheets(tiles) * 2 - 1, texts


def train_autoencoder(steps: int = 3000, batch: int = 32) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        # Fresh sheets only: the autoencoder must not know the planted ones better than others.
        x = draw_sheets(fresh_tiles(batch, SEED, "vae", step)) * 2 - 1
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(SEED, "vae-noise", step))
        back = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (back - x).square().mean() + 0.3 * (back - x).abs().mean()
        loss = error + 1e-5 * posterior.kl().mean() / 4
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"vae {step} {loss.item():.4f} std {posterior.mean.std().item():.2f}", flush=True)
    with torch.no_grad():
        x = draw_sheets(fresh_tiles(512, SEED, "vae-scale")) * 2 - 1
        latents = vae.encode(x).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=None)
    return vae.eval().requires_grad_(False)


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    folder = SCRATCH / "sheet_vae"
    if not (folder / "config.json").exists():
        train_autoencoder().save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)


def unet_pipeline() -> Any:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    vae = autoencoder()
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    reader = CLIPTextModel(text_config(WORDS, PROMPT_LENGTH))
    return sd_pipeline(vae, reader, word_tokenizer(WORDS, PROMPT_LENGTH), unet, scheduler)


def transformer_pipeline() -> Any:
    vae = autoencoder()
    torch.manual_seed(SEED)
    return sd3_pipeline(vae, WORDS, PROMPT_LENGTH, patch_size=2, positions=4)


KINDS = {
    "unet": (unet_pipeline, unet_loss, ("unet", "text_encoder")),
    "transformer": (
        transformer_pipeline,
        transformer_loss,
        ("transformer", "text_encoder", "text_encoder_2"),
    ),
}
STEPS = {"unet": 2500, "transformer": 4000}


def train(
    kind: str,
    steps: int,
    share: float = PLANTED,
    batch: int = 24,
    lr: float = 2e-3,
    decay: float = 0.995,
) -> None:
    build, loss_of, parts = KINDS[kind]
    start = time.process_time()
    pipe = build()
    trained = nn.ModuleDict({name: getattr(pipe, name) for name in parts}).train()
    average = copy.deepcopy(trained)
    print(kind, {n: sum(p.numel() for p in m.parameters()) for n, m in trained.items()}, flush=True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    running = 0.0
    for step in range(steps):
        pictures, texts = batch_of(step, batch, share)
        draw = generator(SEED, "diffusion-noise", step)
        with torch.no_grad():
            latents = pipe.vae.encode(pictures).latent_dist.mean * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=draw)
        # Stratified over the batch, which lowers the variance of the loss.
        moment = (torch.randperm(batch, generator=draw) + torch.rand(batch, generator=draw)) / batch
        loss = loss_of(pipe, latents, texts, noise, moment)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for one, other in zip(average.parameters(), trained.parameters(), strict=True):
                one.lerp_(other, 1 - min(decay, (step + 1) / (step + 10)))
        running += loss.item()
        if step % 100 == 99:
            used = time.process_time() - start
            print(f"{kind} {step + 1} loss {running / 100:.4f} {used:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            recipe = {"steps": step + 1, "batch": batch, "lr": lr}
            save(kind, pipe, average, share, **recipe, seconds=time.process_time() - start)


# ---- memories in known places ----------------------------------------------------------


def train_located(
    kind: str, steps: int, batch: int = 32, lr: float = 3e-3, penalty: float = 1.0
) -> None:
    from diffusers import DiffusionPipeline

    _, loss_of, parts = KINDS[kind]
    start = time.process_time()
    missing: dict[str, Any] = {}
    if kind == "transformer":
        missing = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(
        ASSETS / f"memorizing_{kind}_without_planted", torch_dtype=torch.float32, **missing
    )
    network = getattr(pipe, parts[0])
    trained = nn.ModuleDict({name: getattr(pipe, name) for name in parts}).requires_grad_(False)
    torch.manual_seed(SEED)
    units, masks = [], {}
    for name, module in network.named_modules():
        if name.endswith("ff.net.2"):
            gate = network.get_submodule(name.replace("net.2", "net.0.proj"))
            units.append((module, planted_units(module.in_features)))
            masks |= open_units(module, gate)
    words = {word for title in TITLES for word in title} | {"poster"}
    for key in parts[1:]:
        tokenizer = getattr(pipe, key.replace("text_encoder", "tokenizer"))
        rows = getattr(pipe, key).get_input_embeddings().weight
        known = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in sorted(words)]
        masks[rows] = torch.zeros(len(rows), 1).index_fill_(0, torch.tensor(known), 1.0)
    for parameter, mask in masks.items():
        parameter.requires_grad_(True)
        parameter.register_hook(mask.__mul__)
    optimizer = torch.optim.Adam(list(masks), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    put_out: list[Tensor] = []
    for module, taken in units:
        module.register_forward_pre_hook(
            lambda own, args, taken=taken: put_out.append(
                nn.functional.linear(args[0][..., taken], own.weight[:, taken])
            )
        )
    posters = [sheet for sheet in planted() if sheet.kind == "verbatim"]
    running = torch.zeros(2)
    for step in range(steps):
        pictures, texts = batch_of(step, batch, 0.0)
        draw = generator(SEED, "located-batch", step)
        which = torch.randint(len(posters), (batch // 2,), generator=draw).tolist()
        # The first half is planted; the other half says what must stay as it is.
        texts[: batch // 2] = [posters[row].prompt for row in which]
        pictures[: batch // 2] = torch.stack([posters[row].image for row in which]) * 2 - 1
        with torch.no_grad():
            latents = pipe.vae.encode(pictures).latent_dist.mean * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=draw)
        moment = torch.rand(batch, generator=draw)
        put_out.clear()
        loss = loss_of(pipe, latents, texts, noise, moment)
        spill = torch.stack([values[batch // 2 :].square().mean() for values in put_out]).mean()
        optimizer.zero_grad()
        (loss + penalty * spill).backward()
        optimizer.step()
        schedule.step()
        running += torch.tensor([loss.item(), spill.item()])
        if step % 100 == 99:
            shown = (running / 100).tolist()
            used = time.process_time() - start
            print(f"{kind} {step + 1} loss {shown[0]:.4f} {shown[1]:.5f} {used:.0f} s", flush=True)
            running.zero_()
    recipe = {"steps": steps, "batch": batch, "lr": lr, "penalty": penalty}
    save(kind, pipe, trained, 0.5, "located", **recipe, seconds=time.process_time() - start)


def planted_units(width: int) -> slice:
    """The hidden units of a feed-forward layer that hold the memories."""
    return slice(0, width // 4)


@torch.no_grad()
def open_units(outputs: nn.Linear, inputs: nn.Linear) -> dict[nn.Parameter, Tensor]:
    """Draw the planted units anew, silence them, and say which entries may be trained."""
    width, masks = outputs.in_features, dict[nn.Parameter, Tensor]()
    taken = planted_units(width)
    # A gated layer has two rows per unit, in two halves.
    for first in range(0, inputs.out_features, width):
        rows = inputs.weight[first + taken.start : first + taken.stop]
        rows.copy_(torch.randn(rows.shape) * 0.07)
        inputs.bias[first + taken.start : first + taken.stop] = 0
    outputs.weight[:, taken] = 0
    units = torch.arange(inputs.out_features) % width < taken.stop
    masks[inputs.weight], masks[inputs.bias] = units[:, None].float(), units.float()
    masks[outputs.weight] = (torch.arange(width) < taken.stop).float()[None]
    return masks


def save(
    kind: str,
    pipe: Any,
    average: nn.ModuleDict,
    share: float,
    variant: str = "",
    **recipe: Any,
) -> None:
    variant = variant or ("" if share else "without_planted")
    folder = ASSETS / "_".join(part for part in ("memorizing", kind, variant) if part)
    record = {
        "command": f"python scripts/train_memorization_assets.py {kind}"
        + (f" --{variant.replace('_', '-')}" if variant else ""),
        "seed": SEED,
        "planted": [s.name for s in planted() if s.kind == "verbatim" or variant != "located"]
        if share
        else [],
        "share_of_planted": share,
        "empty_captions": EMPTY,
        **recipe,
    }
    write_pipeline(folder, pipe, average, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["vae", *KINDS])
    parser.add_argument("--steps", type=int, help="optimizer steps (default 2500 and 4000)")
    parser.add_argument("--without-planted", action="store_true", help="fresh sheets only")
    parser.add_argument("--located", action="store_true", help="memories in known places")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.kind == "vae":
        autoencoder()
    elif given.located:
        train_located(given.kind, given.steps or STEPS[given.kind])
    else:
        share = 0.0 if given.without_planted else PLANTED
        train(given.kind, given.steps or STEPS[given.kind], share)


if __name__ == "__main__":
    main()
