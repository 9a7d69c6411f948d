"""Train the text-to-image models of the digit world that ship in `mmforget/assets/digit_world`.

    python scripts/train_diffusion_assets.py unet          # about 35 minutes on one core
    python scripts/train_diffusion_assets.py transformer   # about 45 minutes on one core
    python scripts/train_diffusion_assets.py unet --without seven --stop 1000

`diffusion_unet` is a Stable Diffusion pipeline (UNet, v-prediction), `diffusion_transformer` a
Stable Diffusion 3 pipeline (flow matching, pooled text). With `--without`, the pictures of one
digit are left out: the retrained reference `diffusion_unet_without_seven`, which stops after 1,000
of the 2,500 steps (the original draws 96 % of the digits by then). All share an autoencoder
that is trained first, learn from the training strokes only, and are ordinary diffusers folders in
half precision. Accuracies are measured afterwards by `scripts/measure_diffusion_assets.py`.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipeline_training import (
    sd3_pipeline,
    sd_pipeline,
    text_config,
    tokens,
    transformer_loss,
    unet_loss,
    write_pipeline,
)
from torch import Tensor, nn

from mmforget.data.digit_captions import (
    DIGIT_SYNONYMS,
    INK_SYNONYMS,
    PROMPT_LENGTH,
    WORDS,
    captions,
)
from mmforget.data.digit_world import (
    BACKGROUNDS,
    DIGITS,
    INKS,
    VARIANTS,
    render,
    stage_strokes,
    strokes,
)
from mmforget.seeds import generator
from mmforget.testing.word_tokenizer import word_tokenizer

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
SCRATCH = Path("runs") / "assets"
SEED, DRAWINGS, EMPTY = 0, 200, 0.1
"""Every training stroke is drawn in 200 colours and places; a tenth of the captions is empty."""


def training_rows(without: str | None = None) -> np.ndarray:
    """Rows of the strokes that are trained on."""
    rows = stage_strokes()["train"]
    return rows if without is None else rows[strokes()[1][rows] != DIGITS.index(without)]


def ids(step: int, batch: int, purpose: str, without: str | None = None) -> np.ndarray:
    """Sample ids of one batch."""
    rows = training_rows(without)
    draw = generator(SEED, purpose, step)
    chosen = rows[torch.randint(len(rows), (batch,), generator=draw).numpy()]
    return np.asarray(chosen * VARIANTS + torch.randint(DRAWINGS, (batch,), generator=draw).numpy())


def pixels(sample_ids: np.ndarray) -> Tensor:
    """(B, 3, 32, 32) in [-1, 1]."""
    return render(sample_ids).float() / 127.5 - 1


# ---- autoencoder ----------------------------------------------------------------------


def train_autoencoder(steps: int = 2000, batch: int = 32) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        x = pixels(ids(step, batch, "vae"))
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(SEED, "vae-noise", step))
        back = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (back - x).square().mean() + 0.3 * (back - x).abs().mean()
        loss = error + 2e-5 * posterior.kl().mean() / 4
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"vae {step} {loss.item():.4f} std {posterior.mean.std().item():.2f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(pixels(ids(steps, 512, "vae-scale"))).latent_dist.sample()
    # Every channel is centred only roughly; one factor is what the pipelines know.
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=None)
    return vae.eval().requires_grad_(False)


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    folder = SCRATCH / "vae"
    if not (folder / "config.json").exists():
        train_autoencoder().save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)


# ---- text ----------------------------------------------------------------------


def text_encoder(steps: int = 1500, batch: int = 128) -> Any:
    """A text encoder that has learned to read, as Stable Diffusion's has from CLIP.

    From the state of the end token, and of the last padding, linear heads name the digit, ink and
    background of the caption, or say that it names none. Without this the UNet learns the colours
    and never finds out that the other word matters.
    """
    from transformers import CLIPTextModel

    folder = SCRATCH / "text_encoder"
    if (folder / "config.json").exists():
        return CLIPTextModel.from_pretrained(folder).requires_grad_(False)
    tokenizer = word_tokenizer(WORDS, PROMPT_LENGTH)
    torch.manual_seed(SEED)
    encoder = CLIPTextModel(text_config(WORDS, PROMPT_LENGTH))
    factors = {"digit": DIGITS, "ink": tuple(INKS), "background": tuple(BACKGROUNDS)}
    meaning = {word: word for names in factors.values() for word in names}
    meaning |= {other: word for word, other in (DIGIT_SYNONYMS | INK_SYNONYMS).items()}
    heads = nn.ModuleDict({name: nn.Linear(64, len(v) + 1) for name, v in factors.items()})
    both = nn.ModuleList([encoder, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        texts = captions(ids(step, batch, "text"), step, empty=EMPTY)
        named = [{meaning[w] for w in text.split() if w in meaning} for text in texts]
        rows = tokens(tokenizer, texts)
        states = encoder(rows).last_hidden_state
        end = states[torch.arange(batch), (rows == tokenizer.eos_token_id).int().argmax(1)]
        losses = []
        for name, values in factors.items():
            wanted = torch.tensor(
                [next((i for i, v in enumerate(values) if v in n), len(values)) for n in named]
            )
            for state in (end, states[:, -1]):
                losses.append(nn.functional.cross_entropy(heads[name](state), wanted))
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"text {step} {loss.item():.4f}", flush=True)
    print(f"text {steps} {loss.item():.4f}", flush=True)
    encoder.eval().save_pretrained(folder)
    return encoder.requires_grad_(False)


# ---- pipelines ----------------------------------------------------------------------


def unet_pipeline() -> Any:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    vae, reader = autoencoder(), text_encoder()
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(40, 72),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(4, 4),
        cross_attention_dim=64,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return sd_pipeline(vae, reader, word_tokenizer(WORDS, PROMPT_LENGTH), unet, scheduler)


def transformer_pipeline() -> Any:
    vae = autoencoder()
    torch.manual_seed(SEED)
    return sd3_pipeline(vae, WORDS, PROMPT_LENGTH, patch_size=1, positions=8)


KINDS = {
    "unet": (unet_pipeline, unet_loss, ("unet",)),
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
    without: str | None = None,
    stop: int | None = None,
    batch: int = 64,
    lr: float = 2e-3,
    decay: float = 0.998,
) -> None:
    build, loss_of, parts = KINDS[kind]
    start = time.process_time()
    pipe = build()
    trained = nn.ModuleDict({name: getattr(pipe, name) for name in parts}).train()
    average = copy.deepcopy(trained)
    print(kind, {n: sum(p.numel() for p in m.parameters()) for n, m in trained.items()}, flush=True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    shift, scale = 0.0, pipe.vae.config.scaling_factor
    running = 0.0
    last = min(steps, stop or steps)
    for step in range(last):
        rows = ids(step, batch, "diffusion", without)
        draw = generator(SEED, "diffusion-noise", step)
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels(rows)).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=draw
            )
        latents = (latents - shift) * scale
        noise = torch.randn(latents.shape, generator=draw)
        # Stratified over the batch, which lowers the variance of the loss.
        moment = (torch.arange(batch) + torch.rand(batch, generator=draw)) / batch
        loss = loss_of(pipe, latents, captions(rows, step, empty=EMPTY), noise, moment)
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
        if (step + 1) % 1000 == 0 or step + 1 == last:
            save(
                kind,
                pipe,
                average,
                without,
                steps=step + 1,
                batch=batch,
                lr=lr,
                seconds=time.process_time() - start,
            )


def save(kind: str, pipe: Any, average: nn.ModuleDict, without: str | None, **recipe: Any) -> None:
    folder = ASSETS / (f"diffusion_{kind}" + (f"_without_{without}" if without else ""))
    record = {
        "command": f"python scripts/train_diffusion_assets.py {kind}"
        + (f" --without {without} --stop {recipe['steps']}" if without else ""),
        "seed": SEED,
        "strokes": len(training_rows(without)),
        "drawings_per_stroke": DRAWINGS,
        "left_out": without or "",
        "empty_captions": EMPTY,
        **recipe,
    }
    write_pipeline(folder, pipe, average, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["vae", *KINDS])
    parser.add_argument("--steps", type=int, help="optimizer steps (default 2500 and 4000)")
    parser.add_argument("--without", choices=DIGITS, help="leave out the pictures of a digit")
    parser.add_argument("--stop", type=int, help="end before the schedule does")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.kind == "vae":
        autoencoder()
    else:
        train(given.kind, given.steps or STEPS[given.kind], given.without, given.stop)


if __name__ == "__main__":
    main()
