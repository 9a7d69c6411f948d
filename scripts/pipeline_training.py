"""What the scripts that train the small text-to-image models of the digit world share."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.testing.word_tokenizer import word_tokenizer


def text_config(words: Sequence[str], length: int, projection: int = 64) -> Any:
    """Of a text encoder with two layers that reads these words."""
    from transformers import CLIPTextConfig

    tokenizer = word_tokenizer(words, length)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """(B, L) token ids, padded."""
    length = tokenizer.model_max_length
    rows = tokenizer(texts, padding="max_length", max_length=length, truncation=False)
    return torch.tensor(rows.input_ids)


def sd_pipeline(vae: Any, reader: Any, tokenizer: Any, unet: Any, scheduler: Any) -> Any:
    """A Stable Diffusion pipeline without safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=reader,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3_pipeline(
    vae: Any, words: Sequence[str], length: int, patch_size: int, positions: int
) -> Any:
    """A Stable Diffusion 3 pipeline with two untrained CLIP encoders and without T5."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=positions,
    )
    config = text_config(words, length, 32)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=word_tokenizer(words, length),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=word_tokenizer(words, length),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def unet_loss(pipe: Any, latents: Tensor, texts: list[str], noise: Tensor, time: Tensor) -> Tensor:
    """Mean squared error of the UNet's prediction at moments (B,) in [0, 1)."""
    t = (time * 1000).long().clamp(max=999)
    noisy = pipe.scheduler.add_noise(latents, noise, t)
    states = pipe.text_encoder(tokens(pipe.tokenizer, texts)).last_hidden_state
    found = pipe.unet(noisy, t, encoder_hidden_states=states).sample
    wanted = noise
    if pipe.scheduler.config.prediction_type == "v_prediction":
        wanted = pipe.scheduler.get_velocity(latents, noise, t)
    return (found - wanted).square().mean()


def transformer_loss(
    pipe: Any, latents: Tensor, texts: list[str], noise: Tensor, time: Tensor
) -> Tensor:
    """Mean squared error of the flow at moments (B,) in [0, 1)."""
    # Logit-normal times, as in Stable Diffusion 3.
    sigma = torch.sigmoid(torch.special.ndtri(time.clamp(1e-4, 1 - 1e-4)))[:, None, None, None]
    ids = tokens(pipe.tokenizer, texts)
    one = pipe.text_encoder(ids, output_hidden_states=True)
    two = pipe.text_encoder_2(ids, output_hidden_states=True)
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    # Without T5 the pipeline appends zeros in its place.
    found = pipe.transformer(
        hidden_states=(1 - sigma) * latents + sigma * noise,
        timestep=sigma.flatten() * 1000,
        encoder_hidden_states=torch.cat([states, torch.zeros_like(states)], dim=1),
        pooled_projections=torch.cat([one.text_embeds, two.text_embeds], dim=-1),
    ).sample
    return (found - (noise - latents)).square().mean()


def write_pipeline(folder: Path, pipe: Any, average: nn.ModuleDict, record: dict[str, Any]) -> None:
    """Save a pipeline in half precision, with averaged weights and its record.

    Half precision halves the size; `from_pretrained(..., torch_dtype=float32)` widens it again.
    """
    shutil.rmtree(folder, ignore_errors=True)
    others = [name for name in ("vae", "text_encoder") if name not in average]
    training = {name: getattr(pipe, name) for name in (*average, *others)}
    for name, module in (training | dict(average.items())).items():
        pipe.register_modules(**{name: copy.deepcopy(module).half().eval()})
    pipe.save_pretrained(folder)
    pipe.register_modules(**training)
    for file in folder.rglob("*.json"):  # a part that was loaded keeps the folder it came from
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    (folder / "training.json").write_text(json.dumps(rounded, indent=1) + "\n")
