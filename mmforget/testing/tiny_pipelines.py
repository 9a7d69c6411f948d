"""Tiny diffusers pipelines of every supported kind, built from configs with random weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from mmforget.errors import ConfigurationError, suggest
from mmforget.testing.word_tokenizer import word_tokenizer

TinyKind = Literal["sd", "sd2", "sdxl", "sd3", "sd35", "flux"]

_TEXT = """
a an the of in on and with photo picture image drawing painting style art by person street
red blue cat dog horse house tree car van gogh monet picasso church banana
"""
WORDS = tuple(_TEXT.split())
LENGTH = 16


def tiny_pipeline(kind: TinyKind, seed: int = 0) -> Any:
    """Build a pipeline of random weights, 16x16 pixels, in milliseconds.

    Args:
        kind: ``sd`` (epsilon), ``sd2`` (v-prediction), ``sdxl``, ``sd3``, ``sd35`` (with dual
            attention layers) or ``flux``.
        seed: of the weights.

    Raises:
        ConfigurationError: an unknown kind.
    """
    if kind not in get_args(TinyKind):
        raise ConfigurationError(f"`kind` is '{kind}', {suggest(kind, get_args(TinyKind))}")
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        if kind in ("sd", "sd2"):
            return _stable_diffusion("epsilon" if kind == "sd" else "v_prediction")
        if kind == "sdxl":
            return _sdxl()
        if kind == "flux":
            return _flux()
        return _sd3(dual=kind == "sd35")
    finally:
        torch.set_rng_state(state)


def _tokenizer() -> Any:
    return word_tokenizer(WORDS, LENGTH)


def _clip(width: int, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    pieces += [(character, -5.0) for character in "▁abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config).eval(), tokenizer


def _vae(channels: int, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=shift,
        scaling_factor=0.5,
    )
    return vae.eval()


def _unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
        }
        | settings
    )
    return unet.eval()


def _stable_diffusion(prediction: str) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(32),
        tokenizer=_tokenizer(),
        # As wide as the first block, so that widths alone cannot tell the attentions apart.
        unet=_unet(cross_attention_dim=32),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(16),
        text_encoder_2=_clip(16, projection=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
            transformer_layers_per_block=(1, 1),
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
        add_watermarker=False,
    )


def _sd3(dual: bool) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    encoder, tokenizer = _t5()
    transformer: Any = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift=0.1),
        text_encoder=_clip(16, projection=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(16, projection=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    encoder, tokenizer = _t5()
    transformer: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipeline: Any = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift=0.1),
        text_encoder=_clip(32),
        tokenizer=_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )
    # Its pipeline assumes 128x128 latents; ours are 8x8.
    pipeline.default_sample_size = 8
    return pipeline
