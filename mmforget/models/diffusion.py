"""Text-to-image diffusion models of diffusers, as one Lightning module."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    DataError,
    DivergenceError,
    ModelError,
    RequestError,
)
from mmforget.models.base import (
    Batch,
    Model,
    PromptEmbedding,
    Segment,
    Site,
    SiteKind,
    TextLayer,
)
from mmforget.models.pipeline_files import captured, read_pipeline
from mmforget.models.text_layers import Family, chosen, family_of, in_stages
from mmforget.seeds import derive, generator

logger = logging.getLogger(__name__)

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
"""Supported pipelines and our short names for their ways of handling text and time."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T5_TOKENIZERS = {"sd3": "tokenizer_3", "flux": "tokenizer_2"}
"""Those whose limit is an argument of the pipeline, not a property of the encoder."""

GUIDANCE_FILE = "mmforget_guidance.json"

Prediction = Literal["epsilon", "v_prediction", "flow"]


class Guider(Protocol):
    """Guidance that replaces the plain classifier-free one, see `mmforget.models.guidance`."""

    def prepare(self, model: DiffusionGenerator) -> PromptEmbedding:
        """Return the embeddings of the further prompts, one or several, that it needs."""
        ...

    def guide(
        self,
        step: int,
        conditional: Tensor,
        unconditional: Tensor,
        further: Tensor,
        scale: float,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Combine the predictions of one step.

        Args:
            step: index of the sampling step, from 0.
            conditional: (B, C, H, W).
            unconditional: (B, C, H, W).
            further: (K, B, C, H, W) predictions for the prompts of `prepare`.
            scale: guidance scale.
            state: kept from step to step, empty at the start.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Settings with the key ``guidance``, its class name, for `GUIDANCE_FILE`."""
        ...


@dataclass(frozen=True)
class SamplingStep:
    """One step of a trajectory, as it was handed to the network.

    Attributes:
        noisy: (B, C, H, W) network input, scaled as the network expects it.
        time: (B,) in the scheduler's units.
        conditional: (B, C, H, W) raw prediction.
        unconditional: (B, C, H, W) raw prediction for the empty text; for a distilled model it is
            the conditional one again, since such models make no second prediction.
    """

    noisy: Tensor
    time: Tensor
    conditional: Tensor
    unconditional: Tensor


class DiffusionGenerator(Model):
    """A diffusers text-to-image pipeline: Stable Diffusion 1, 2, XL, 3, or FLUX.

    `network` is the denoiser; text encoders and autoencoder are frozen companions. Pictures are
    made by a sampling loop of our own, which gives what the pipeline gives for the same noise, and
    besides that records trajectories, takes other guidance and draws its noise per picture. The
    pipeline's safety checker and watermark are left out: they would count as forgetting.

    Args:
        pipeline: a loaded pipeline. Its modules are used, not copied.
        lr: learning rate for plain training.
        steps: sampling steps for `generate`.
        guidance: guidance scale for `generate`; at most 1 switches guidance off. For FLUX it is
            the embedded guidance of the distilled model.
        size: side of the pictures in pixels; None takes the family's native one.
        max_sequence_length: tokens that T5 reads in Stable Diffusion 3 and FLUX, 1 to 512; None
            takes the pipeline's default. A pipeline without T5 gets so many rows of zeros instead,
            which cost as much time as rows that mean something.

    Raises:
        ModelError: no text-to-image pipeline of a supported family, or one that is incomplete or
            has adapters loaded.
        CapabilityError: no layer of the denoiser reads text.
        ConfigurationError: `steps` below 1, or a `size` that is no multiple of a patch.

    Shape:
        Latents are (B, C, h, w), also for FLUX, whose packing stays inside `predict`.
    """

    def __init__(
        self,
        pipeline: Any,
        lr: float = 1e-4,
        steps: int = 20,
        guidance: float = 3.0,
        size: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        name = type(pipeline).__name__
        if name not in PIPELINES:
            raise ModelError(
                f"`pipeline` is a {name}, which is no supported text-to-image pipeline; supported "
                f"are {', '.join(PIPELINES)}"
            )
        _check_steps(steps)
        self.kind = PIPELINES[name]
        self.pipeline = pipeline
        component = "transformer" if self.kind in ("sd3", "flux") else "unet"
        network = getattr(pipeline, component, None)
        if network is None:
            raise ModelError(f"the {name} has no {component}; load the whole pipeline")
        self.family: Family = family_of(network)
        self.network: Any = network  # diffusers types its modules by strings
        encoders = {key: getattr(pipeline, key, None) for key in TEXT_ENCODERS}
        self.text_encoders = nn.ModuleDict({k: v for k, v in encoders.items() if v is not None})
        if not self.text_encoders:
            raise ModelError(f"the {name} has no text encoder, so that no prompt can be read")
        if pipeline.vae is None:
            raise ModelError(f"the {name} has no autoencoder (`vae`); load the whole pipeline")
        self.vae = pipeline.vae
        for part in (self.text_encoders, self.vae):
            part.requires_grad_(False)
        self.lr, self.steps, self.guidance, self.size = lr, steps, guidance, size
        if max_sequence_length is not None and self.kind not in T5_TOKENIZERS:
            raise ConfigurationError(
                f"`max_sequence_length` is {max_sequence_length}, but a {name} has no T5; leave it "
                "out"
            )
        if max_sequence_length is not None and not 1 <= max_sequence_length <= 512:
            raise ConfigurationError(
                f"`max_sequence_length` is {max_sequence_length}, it must be 1 to 512"
            )
        self.max_sequence_length = max_sequence_length
        self.guider: Guider | None = None
        self.source = ""
        patch = pipeline.vae_scale_factor * self._patch
        if size is not None and (size < patch or size % patch):
            raise ConfigurationError(f"`size` is {size}, it must be a multiple of {patch} pixels")
        self.text_layers()
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser; the dropout of a frozen T5 would blur the prompts."""
        super().train(mode)
        self.text_encoders.eval()
        self.vae.eval()
        return self

    # ---- what the family is -------------------------------------------------------------------

    @property
    def component(self) -> str:
        """Attribute of the pipeline that holds the denoiser: ``unet`` or ``transformer``."""
        return self.family.component

    @property
    def prediction(self) -> Prediction:
        """What the network predicts.

        Raises:
            ModelError: a prediction type that no supported pipeline uses.
        """
        if self.kind in ("sd3", "flux"):
            return "flow"
        kind = self.pipeline.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the scheduler has prediction type '{kind}'; supported are 'epsilon' and "
                "'v_prediction'"
            )
        return cast(Prediction, kind)

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the network instead of a second pass (FLUX, LCM)."""
        return self.kind == "flux" or self._guidance_width is not None

    @property
    def _guidance_width(self) -> int | None:
        """Width of the embedded guidance of a distilled UNet."""
        return getattr(self.network.config, "time_cond_proj_dim", None)

    @property
    def _patch(self) -> int:
        """Side of the squares of latents that enter the network as one."""
        if self.family.packed:
            return 2
        return int(self.network.config.patch_size) if self.kind == "sd3" else 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture.

        Raises:
            ModelError: the denoiser needs more than latents and a prompt, as for inpainting.
        """
        config = self.network.config
        channels = config.in_channels // 4 if self.family.packed else config.in_channels
        made = self.vae.config.latent_channels
        if channels != made:
            raise ModelError(
                f"the denoiser takes {channels} channels, but the autoencoder makes {made}; "
                "pictures need a text-to-image pipeline, others take closed-form methods only"
            )
        # FLUX has no size of its own; its pipeline's default is 128 latents, 1024 pixels.
        size = getattr(config, "sample_size", None) or self.pipeline.default_sample_size
        if self.size is not None:
            size = self.size // self.pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @property
    def dtype_of_network(self) -> torch.dtype:
        """Floating type of the denoiser's weights."""
        return next(p.dtype for p in self.network.parameters() if p.is_floating_point())

    def require_full_precision(self, what: str) -> None:
        """Refuse half precision on the CPU, where many operations lack it or are very slow.

        Args:
            what: is asked for, for the message.

        Raises:
            ModelError: says how to change it.
        """
        half = self.dtype_of_network in (torch.float16, torch.bfloat16)
        if half and next(self.network.parameters()).device.type == "cpu":
            raise ModelError(
                f"{what} on the CPU needs single precision, the pipeline has "
                f"{str(self.dtype_of_network).removeprefix('torch.')}; load it with "
                "`torch_dtype=torch.float32`, or move it to a GPU"
            )

    # ---- text -----------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> PromptEmbedding:
        """Embed prompts as the pipeline does, in the precision of the denoiser.

        Args:
            prompts: texts, at least one.

        Raises:
            RequestError: a prompt is longer than a text encoder reads; nothing is truncated.
        """
        self.check_length(prompts)
        texts, pooled = list(prompts), None
        device, pipe = next(self.network.parameters()).device, self.pipeline
        length = {} if self.kind not in T5_TOKENIZERS else {"max_sequence_length": self._t5_length}
        if self.kind == "sd":
            states, _ = pipe.encode_prompt(texts, device, 1, False)
        elif self.kind == "sdxl":
            states, _, pooled, _ = pipe.encode_prompt(
                texts, device=device, do_classifier_free_guidance=False
            )
        elif self.kind == "sd3":
            states, _, pooled, _ = pipe.encode_prompt(
                texts, None, None, device=device, do_classifier_free_guidance=False, **length
            )
        else:
            states, pooled, _ = pipe.encode_prompt(texts, None, device=device, **length)
        return self._cast(PromptEmbedding(states, pooled))

    def _cast(self, embedding: PromptEmbedding) -> PromptEmbedding:
        dtype, pooled = self.dtype_of_network, embedding.pooled
        return PromptEmbedding(
            embedding.states.to(dtype), None if pooled is None else pooled.to(dtype)
        )

    def unconditional(self) -> PromptEmbedding:
        """One row: what guidance leads away from. The empty text, but zeros for SDXL."""
        empty = self.encode([""])
        if self.kind == "sdxl" and self.pipeline.config.force_zeros_for_empty_prompt:
            assert empty.pooled is not None
            return PromptEmbedding(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
        return empty

    @property
    def _t5_length(self) -> int:
        """Tokens that T5 reads."""
        given = self.max_sequence_length
        return given or _default_of(self.pipeline.encode_prompt, "max_sequence_length")

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """Tokenizers that are in use, each with the longest prompt it takes."""
        pipe, found = self.pipeline, []
        for key, encoder in zip(
            ("tokenizer", "tokenizer_2", "tokenizer_3"), TEXT_ENCODERS, strict=True
        ):
            tokenizer = getattr(pipe, key, None)
            if tokenizer is None or encoder not in self.text_encoders:
                continue
            if T5_TOKENIZERS.get(self.kind) == key:
                limit = self._t5_length
            elif self.kind in T5_TOKENIZERS:
                limit = pipe.tokenizer_max_length
            else:
                limit = tokenizer.model_max_length
            found.append((tokenizer, int(limit)))
        return found

    def check_length(self, prompts: Sequence[str]) -> None:
        """Refuse prompts of which an encoder would only read the beginning.

        Args:
            prompts: texts.

        Raises:
            RequestError: names the prompt and both lengths; or `prompts` is no list of texts.
        """
        texts = _texts(prompts)
        for tokenizer, limit in self._tokenizers():
            rows = tokenizer(texts, truncation=False, verbose=False).input_ids
            for prompt, row in zip(texts, rows, strict=True):
                if len(row) > limit:
                    raise RequestError(
                        f"the prompt '{prompt[:60]}{'…' if len(prompt) > 60 else ''}' has "
                        f"{len(row)} tokens, the text encoder reads {limit}; shorten it"
                    )

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Which positions of the token states belong to which tokens, tokenizer by tokenizer.

        Args:
            prompts: texts, at least one.

        Raises:
            RequestError: see `check_length`.
        """
        self.check_length(prompts)
        pairs = self._tokenizers()
        if self.kind in ("sd", "sdxl"):
            pairs = pairs[:1]  # SDXL joins its two encoders feature by feature
        elif self.kind == "sd3":
            # T5 comes after the two CLIP encoders; without it the pipeline appends zeros.
            pairs = [pairs[0], *pairs[2:]]
        else:
            pairs = pairs[1:]  # FLUX takes its states from T5 alone
        found, start = [], 0
        for tokenizer, limit in pairs:
            rows = tokenizer(list(prompts), padding="max_length", max_length=limit).input_ids
            plain = tokenizer(list(prompts), add_special_tokens=False).input_ids
            begin = len(tokenizer("", add_special_tokens=True).input_ids) - 1
            ids = torch.tensor(rows)
            content = torch.zeros(ids.shape, dtype=torch.bool)
            for row, tokens in enumerate(plain):
                content[row, begin : begin + len(tokens)] = True
            found.append(Segment(start, ids, content, begin))
            start += limit
        return found

    def text_layers(self) -> list[TextLayer]:
        """Layers whose input is a function of the prompt alone, in forward order.

        Raises:
            CapabilityError: there is none.
            ModelError: their weights cannot be edited, see `mmforget.models.text_layers.chosen`.
        """
        self._refuse_adapters()
        return chosen(self.family.text_layers(self.network), self.network)

    def _refuse_adapters(self) -> None:
        for part in (self.network, *self.text_encoders.values()):
            adapters = getattr(part, "peft_config", None)
            if adapters:
                raise ModelError(
                    f"the pipeline has LoRA adapters loaded ({', '.join(adapters)}); take them out "
                    "by `pipe.unload_lora_weights()`, after `pipe.fuse_lora()` to keep their effect"
                )

    def sites(self, kind: SiteKind) -> list[Site]:
        """Layers of the denoiser by function; see `mmforget.models.base.Sites`.

        ``cross_attention`` are the projections between text and picture, ``text_reading`` the
        closed-form sites, ``all`` every linear and convolutional layer.

        Args:
            kind: which layers.

        Raises:
            CapabilityError: there is none.
        """
        self._refuse_adapters()
        if kind == "text_reading":
            sites = [
                Site(layer.name, layer.module, layer.name.rpartition(".")[0])
                for layer in self.text_layers()
            ]
        elif kind == "cross_attention":
            sites = self.family.cross_attention(self.network)
        else:
            sites = [
                Site(name, module, name.rpartition(".")[0])
                for name, module in in_stages(self.network.named_modules())
                if isinstance(module, nn.Linear | nn.Conv2d) and _plays(name, kind)
            ]
        if not sites:
            raise CapabilityError(
                f"{type(self.network).__name__} has no layers of kind '{kind}'; choose another kind"
            )
        return sites

    # ---- the network ----------------------------------------------------------------------------

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        embedding: PromptEmbedding,
        guidance: float = 1.0,
    ) -> Tensor:
        """Raw output of the denoiser: noise, velocity or flow, in the denoiser's precision.

        Args:
            noisy: (B, C, h, w) network input (see `SamplingStep`).
            time: (B,) or (), in the scheduler's units, 0 to 1000.
            embedding: of B prompts.
            guidance: embedded guidance of a distilled model; 1.0 is the neutral value.
        """
        noisy, embedding = noisy.to(self.dtype_of_network), self._cast(embedding)
        time = time.to(noisy.device).expand(len(noisy))
        if self.kind == "flux":
            return self._predict_flux(noisy, time, embedding, guidance)
        if self.kind == "sd3":
            return cast(
                Tensor,
                self.network(
                    hidden_states=noisy,
                    timestep=time,
                    encoder_hidden_states=embedding.states,
                    pooled_projections=embedding.pooled,
                    return_dict=False,
                )[0],
            )
        further: dict[str, Any] = {}
        if self.kind == "sdxl":
            size = [side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:]]
            numbers = torch.tensor([*size, 0, 0, *size], dtype=noisy.dtype, device=noisy.device)
            further["added_cond_kwargs"] = {
                "text_embeds": embedding.pooled,
                "time_ids": numbers.repeat(len(noisy), 1),
            }
        if self._guidance_width is not None:
            weight = torch.full((len(noisy),), guidance - 1.0)
            further["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(
                weight, embedding_dim=self._guidance_width
            ).to(noisy)
        return cast(
            Tensor,
            self.network(
                noisy,
                time,
                encoder_hidden_states=embedding.states,
                return_dict=False,
                **further,
            )[0],
        )

    def _predict_flux(
        self, noisy: Tensor, time: Tensor, embedding: PromptEmbedding, guidance: float
    ) -> Tensor:
        pipe, (batch, channels, height, width) = self.pipeline, noisy.shape
        embedded = None
        if self.network.config.guidance_embeds:
            embedded = torch.full((batch,), guidance, device=noisy.device, dtype=torch.float32)
        found = self.network(
            hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
            timestep=time.to(noisy.dtype) / 1000,
            guidance=embedded,
            pooled_projections=embedding.pooled,
            encoder_hidden_states=embedding.states,
            txt_ids=torch.zeros(
                embedding.states.shape[1], 3, device=noisy.device, dtype=noisy.dtype
            ),
            img_ids=pipe._prepare_latent_image_ids(
                batch, height // 2, width // 2, noisy.device, noisy.dtype
            ),
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        return cast(Tensor, pipe._unpack_latents(found, height * scale, width * scale, scale))

    # ---- noise ----------------------------------------------------------------------------------

    def _levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, 1, 1, 1) of picture and noise at times (B,)."""
        if self.prediction == "flow":
            noise = (time.to(like) / 1000)[:, None, None, None]
            return 1 - noise, noise
        table = self.pipeline.scheduler.alphas_cumprod.to(like.device)
        signal = table[time.long().to(like.device)].to(like)[:, None, None, None]
        return signal.sqrt(), (1 - signal).sqrt()

    def noised(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mix latents with noise, scaled as a network input.

        Args:
            latents: (B, C, h, w).
            noise: (B, C, h, w) standard normal.
            time: (B,) in the scheduler's units, whole numbers except for flow.
        """
        signal, level = self._levels(time, latents)
        return signal * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What a perfect network predicts for `noised(latents, noise, time)`.

        Args:
            latents: (B, C, h, w).
            noise: (B, C, h, w) standard normal.
            time: (B,) in the scheduler's units, whole numbers except for flow.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        signal, level = self._levels(time, latents)
        return signal * noise - level * latents

    def as_noise(self, found: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The noise that a raw output of the network amounts to.

        Args:
            found: (B, C, h, w) as `predict` returns it.
            noisy: (B, C, h, w) what it was predicted for.
            time: (B,) in the scheduler's units.
        """
        if self.prediction == "epsilon":
            return found
        signal, level = self._levels(time, noisy)
        if self.prediction == "flow":
            return noisy + signal * found
        return signal * found + level * noisy

    def draw_times(self, count: int, draw: torch.Generator) -> Tensor:
        """Draw (count,) training times, uniform over the noise levels.

        Args:
            count: how many.
            draw: generator, on the CPU.
        """
        if self.prediction == "flow":
            return (torch.rand(count, generator=draw) * 999 + 1).float()
        steps = self.pipeline.scheduler.config.num_train_timesteps
        return torch.randint(0, steps, (count,), generator=draw)

    # ---- pictures -------------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Encode images; the mean of the posterior, without a draw.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, C, h, w) in the precision of the denoiser.
        """
        with self._full_autoencoder():
            mean = self.vae.encode(images.to(self.vae.dtype) * 2 - 1).latent_dist.mean
        shift, spread = self._normalisation(mean)
        latents = (mean - shift) * self.vae.config.scaling_factor / spread
        return cast(Tensor, latents.to(self.dtype_of_network))

    def to_images(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, 3, H, W) in [0, 1], in the precision of the autoencoder.
        """
        shift, spread = self._normalisation(latents)
        plain = latents * spread / self.vae.config.scaling_factor + shift
        with self._full_autoencoder():
            decoded = self.vae.decode(plain.to(self.vae.dtype), return_dict=False)[0]
        return cast(Tensor, (decoded / 2 + 0.5).clamp(0, 1))

    def _normalisation(self, like: Tensor) -> tuple[Any, Any]:
        """Shift and spread of the autoencoder's latents, where the family has them."""
        config = self.vae.config
        if self.kind == "sdxl" and getattr(config, "latents_mean", None) is not None:
            mean, spread = (
                torch.tensor(values).to(like)[:, None, None]
                for values in (config.latents_mean, config.latents_std)
            )
            return mean, spread
        shift = getattr(config, "shift_factor", None) if self.kind in ("sd3", "flux") else None
        return shift or 0.0, 1.0

    @contextlib.contextmanager
    def _full_autoencoder(self) -> Iterator[None]:
        """Single precision for an autoencoder that says that it overflows in half precision."""
        narrow = self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False)
        if not narrow or self.kind != "sdxl":
            yield
            return
        self.vae.to(torch.float32)
        try:
            yield
        finally:
            self.vae.to(torch.float16)

    def noise(self, prompts: Sequence[str], n: int, seed: int, first: int = 0) -> Tensor:
        """Starting noise (len(prompts) * n, C, h, w), drawn per picture on the CPU.

        Args:
            prompts: texts.
            n: pictures per prompt.
            seed: base of the draws.
            first: number of the first picture of each prompt.
        """
        rows = [
            torch.randn(self.latent_shape, generator=generator(seed, "picture", prompt, number))
            for prompt in prompts
            for number in range(first, first + n)
        ]
        parameter = next(self.network.parameters())
        return torch.stack(rows).to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def generate(
        self,
        condition: Sequence[str],
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Make pictures.

        Args:
            condition: prompts, at least one. Equal ones get equal pictures, which are made once.
            n: pictures per prompt, at least 1.
            seed: each picture depends on seed, prompt and its number only.
            steps: sampling steps, by default those of the constructor.
            guidance: guidance scale, by default that of the constructor.
            batch_size: pictures at a time, at least 1.
            progress: called with the number of pictures made so far after every batch.

        Returns:
            (len(condition) * n, 3, H, W) float32 in [0, 1], on the CPU.

        Raises:
            RequestError: no prompts, or a prompt is too long.
            ConfigurationError: a number below 1.
            ModelError: half precision on the CPU.
            DivergenceError: a picture is not finite.
        """
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")
        prompts = _texts(condition)
        self.require_full_precision("`generate`")
        distinct = list(dict.fromkeys(prompts))
        self.check_length(distinct)
        empty = self.unconditional()
        rows = [(p, number) for p in distinct for number in range(n)]
        made: list[Tensor] = []
        table: dict[str, PromptEmbedding] = {}
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            needed = list(dict.fromkeys(p for p, _ in part))
            new = [p for p in needed if p not in table]
            # Pictures come prompt by prompt, so that what is not needed now never will be again.
            table = {p: table[p] for p in needed if p in table}
            if new:
                found = self.encode(new)
                table |= {p: found[row : row + 1] for row, p in enumerate(new)}
            embedding = PromptEmbedding.cat([table[p] for p, _ in part])
            latents = self.drawn(part, embedding, empty, seed, steps, guidance)
            if not bool(latents.isfinite().all()):
                raise DivergenceError(
                    f"the pictures for '{part[0][0][:60]}' are not finite; if the model is in half "
                    "precision, load it with `torch_dtype=torch.float32`, else it is damaged"
                )
            made.append(self.to_images(latents).float().cpu())
            if progress is not None:
                progress(start + len(part))
        images, place = torch.cat(made), {p: n * row for row, p in enumerate(distinct)}
        if len(distinct) == len(prompts):
            return images
        return images[[place[p] + number for p in prompts for number in range(n)]]

    def drawn(
        self,
        keys: Sequence[tuple[str, int]],
        embedding: PromptEmbedding,
        empty: PromptEmbedding,
        seed: int,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Denoise pictures whose noise depends on their key and the seed only.

        Args:
            keys: B prompts and numbers; they choose the noise, `embedding` what is drawn from it.
            embedding: of B prompts.
            empty: what guidance leads away from, one row.
            seed: of starting noise and sampler.
            steps: by default those of the constructor.
            guidance: by default that of the constructor.

        Returns:
            (B, C, h, w) latents.
        """
        return self.sample(
            torch.cat([self.noise([prompt], 1, seed, first=number) for prompt, number in keys]),
            embedding,
            empty,
            steps=steps,
            guidance=guidance,
            draws=[generator(seed, "sampler", prompt, number) for prompt, number in keys],
        )

    def sample(
        self,
        noise: Tensor,
        embedding: PromptEmbedding,
        empty: PromptEmbedding,
        steps: int | None = None,
        guidance: float | None = None,
        record: Callable[[SamplingStep], None] | None = None,
        draws: list[torch.Generator] | None = None,
        start: int = 0,
        before: Callable[[float, slice], None] | None = None,
    ) -> Tensor:
        """Denoise latents as the pipeline would.

        Args:
            noise: (B, C, h, w) standard normal; with `start`, latents at that step's noise level.
            embedding: of B prompts.
            empty: `unconditional`, one row.
            steps: sampling steps, by default those of the constructor.
            guidance: guidance scale, by default that of the constructor.
            record: receives every step.
            draws: one generator per picture, for samplers that add noise; without them such
                samplers take the global one.
            start: index of the first step.
            before: called before every pass with its time, in the scheduler's units, and with the
                rows of the network's batch that are conditioned on the prompts.

        Returns:
            (B, C, h, w) latents.

        Raises:
            ConfigurationError: fewer than 1 step, or a `guider` without guidance to change.
        """
        steps = self.steps if steps is None else steps
        scale = self.guidance if guidance is None else guidance
        scheduler, times = self.schedule(steps, noise)
        rows = torch.zeros(len(noise), dtype=torch.long, device=empty.states.device)
        unconditional = empty[rows]
        guided = scale > 1 and not self.distilled
        further = None
        if self.guider is not None:
            if not guided:
                raise ConfigurationError(
                    f"{type(self.guider).__name__} changes classifier-free guidance, but there is "
                    + ("none in a distilled model" if self.distilled else f"none at {scale:g}")
                    + "; use `guidance` above 1 and a model that is not distilled"
                )
            further = self.guider.prepare(self)
        latents = noise if start else noise * getattr(scheduler, "init_noise_sigma", 1.0)
        state: dict[str, Tensor] = {}
        extra: dict[str, Any] = {}
        if draws is not None and "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = draws
        for number, time in enumerate(times[start:], start):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, time)
            double = not self.distilled and (guided or record is not None)
            if before is not None:
                rest = len(scaled) if double else 0
                before(float(time), slice(rest, rest + len(scaled)))
            if self.distilled:
                conditional = plain = self.predict(scaled, time, embedding, guidance=scale)
            elif double:
                both = PromptEmbedding.cat([unconditional, embedding])
                plain, conditional = self.predict(torch.cat([scaled] * 2), time, both).chunk(2)
            else:
                conditional = plain = self.predict(scaled, time, embedding)
            if record is not None:
                record(SamplingStep(scaled, time.expand(len(scaled)), conditional, plain))
            found = conditional
            if self.guider is not None and further is not None:
                more = torch.stack(
                    [self.predict(scaled, time, further[rows + k]) for k in range(len(further))]
                )
                found = self.guider.guide(number, conditional, plain, more, scale, state)
            elif guided:
                found = plain + scale * (conditional - plain)
            latents = scheduler.step(found, time, latents, return_dict=False, **extra)[0]
        return latents

    def schedule(self, steps: int, latents: Tensor) -> tuple[Any, Tensor]:
        """A scheduler of its own, prepared for sampling, and its times.

        Args:
            steps: sampling steps, at least 1.
            latents: (B, C, h, w); device and size matter.
        """
        _check_steps(steps)
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        device, settings = latents.device, dict[str, Any]()
        if self.kind in ("sd3", "flux"):
            tokens = (latents.shape[-2] // self._patch) * (latents.shape[-1] // self._patch)
            if scheduler.config.get("use_dynamic_shifting", None):
                settings["mu"] = _shift_of(scheduler.config, tokens, self.kind)
            if self.kind == "flux" and not scheduler.config.get("use_flow_sigmas", False):
                settings["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if "sigmas" not in settings:
            settings["num_inference_steps"] = steps
        scheduler.set_timesteps(device=device, **settings)
        return scheduler, scheduler.timesteps

    # ---- training -------------------------------------------------------------------------------

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Squared error of the prediction at one random time per sample.

        Args:
            batch: ``image`` (B, 3, H, W) in [0, 1], ``caption`` (list of B texts), ``id`` (B,),
                which keys the draws together with `current_epoch`.
            features: not used; a denoiser has none.

        Returns:
            (B,) losses.

        Raises:
            DataError: a batch without captions.
        """
        if "caption" not in batch:
            raise DataError(
                f"{type(self).__name__} learns from captioned images, the batch has only "
                f"{', '.join(batch)}; add `caption`, a list of texts"
            )
        latents = self.to_latents(batch["image"])
        keys = [int(i) for i in batch["id"]]
        draws = [generator(derive(0, "loss", self.current_epoch), "noise", k) for k in keys]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=d) for d in draws])
        time = torch.cat([self.draw_times(1, d) for d in draws]).to(latents.device)
        noise = noise.to(latents)
        found = self.predict(self.noised(latents, noise, time), time, self.encode(batch["caption"]))
        return (found - self.target(latents, noise, time)).square().flatten(1).mean(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Plain training on captioned images."""
        loss = self.loss(batch).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the denoiser."""
        return torch.optim.AdamW(self.network.parameters(), lr=self.lr)

    # ---- saving ---------------------------------------------------------------------------------

    def save_native(self, folder: Path) -> None:
        """Write a diffusers pipeline folder, which diffusers loads without mmforget.

        Guidance that is no part of the weights goes into `GUIDANCE_FILE`; only `load_generator`
        knows about that file.

        Args:
            folder: an existing, empty folder.
        """
        with captured():
            self.pipeline.save_pretrained(folder, safe_serialization=True)
        if self.guider is not None:
            text = json.dumps(self.guider.to_dict(), indent=1, ensure_ascii=False)
            (Path(folder) / GUIDANCE_FILE).write_text(text + "\n", encoding="utf-8")

    def fresh(self, seed: int) -> Self:
        """The same architecture with a newly drawn denoiser; text encoders stay, guidance goes.

        Args:
            seed: decides the weights; the global random generator is left as it is.
        """
        with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
            torch.default_generator.manual_seed(derive(seed, "fresh"))
            network = type(self.network).from_config(self.network.config)
        network.to(next(self.network.parameters()).device)
        if network.dtype != self.dtype_of_network:
            network.to(self.dtype_of_network)
        # Everything else is copied; the trainer stays with this model.
        kept: dict[int, Any] = {id(self.network): network, id(self.guider): None}
        if self._trainer is not None:
            kept[id(self._trainer)] = None
        model = copy.deepcopy(self, kept)
        model.source = ""
        return model.eval()


def load_generator(
    source: str | Path,
    torch_dtype: torch.dtype = torch.float32,
    steps: int = 20,
    guidance: float = 3.0,
    size: int | None = None,
    max_sequence_length: int | None = None,
    **settings: Any,
) -> DiffusionGenerator:
    """Load a text-to-image pipeline.

    Args:
        source: local diffusers folder, or hub id.
        torch_dtype: precision of the weights.
        steps: see `DiffusionGenerator`.
        guidance: see `DiffusionGenerator`.
        size: see `DiffusionGenerator`.
        max_sequence_length: see `DiffusionGenerator`.
        settings: further arguments of `DiffusionPipeline.from_pretrained`, such as ``variant``.

    Raises:
        MissingFileError: a local path that is no diffusers folder, or an unreachable hub id.
        ModelError: another kind of pipeline.
        WeightsError: broken or missing weights, or weights in a format that can execute code.
    """
    pipeline = read_pipeline(source, tuple(PIPELINES), torch_dtype, **settings)
    model = DiffusionGenerator(
        pipeline,
        steps=steps,
        guidance=guidance,
        size=size,
        max_sequence_length=max_sequence_length,
    )
    model.source = str(source)
    file = Path(source).expanduser() / GUIDANCE_FILE
    if file.is_file():
        from mmforget.models.guidance import load_guidance

        model.guider = load_guidance(json.loads(file.read_text(encoding="utf-8")))
    return model


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigurationError(f"`steps` is {steps}, it must be at least 1")


def _texts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise RequestError(f"prompts are given as the text '{prompts[:60]}'; give a list of texts")
    texts = list(prompts)
    if not texts:
        raise RequestError("the list of prompts is empty; give at least one")
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"the prompt {text!r} is no text; put it into quotes")
    return texts


def _plays(name: str, kind: SiteKind) -> bool:
    if kind == "all":
        return True
    parts = name.split(".")
    if kind == "ffn":
        return any(part in ("ff", "ff_context") for part in parts)
    return any(part.startswith("attn") for part in parts)


def _default_of(function: Callable[..., Any], argument: str) -> int:
    return int(inspect.signature(function).parameters[argument].default)


def _shift_of(config: Any, tokens: int, kind: str) -> float:
    """Resolution-dependent shift of the noise levels, linear in the number of image tokens."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low = config.get("base_shift", 0.5)
    high = config.get("max_shift", 1.16 if kind == "sd3" else 1.15)
    return float(low + (high - low) / (most - least) * (tokens - least))
