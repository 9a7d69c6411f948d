"""Text-to-image diffusion models of diffusers, as one Lightning module."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn

from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    MissingFileError,
    ModelError,
    RequestError,
    WeightsError,
    suggest,
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
from mmforget.models.text_layers import Family, chosen, family_of
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
            conditional, unconditional: (B, C, H, W).
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
        conditional, unconditional: (B, C, H, W) raw predictions; without guidance they are equal.
    """

    noisy: Tensor
    time: Tensor
    conditional: Tensor
    unconditional: Tensor


class DiffusionGenerator(Model):
    """A diffusers text-to-image pipeline: Stable Diffusion 1, 2, XL, 3, or FLUX.

    `network` is the denoiser; text encoders and autoencoder are frozen companions. Pictures are
    made by a sampling loop of our own, which gives what the pipeline gives for the same noise, and
    besides that records trajectories, takes other guidance and draws its noise per picture.

    Args:
        pipeline: a loaded pipeline. Its modules are used, not copied.
        lr: learning rate for plain training.
        steps: sampling steps for `generate`.
        guidance: guidance scale for `generate`; at most 1 switches guidance off. For FLUX it is
            the embedded guidance of the distilled model.

    Raises:
        ModelError: no text-to-image pipeline of a supported family.
        CapabilityError: no layer of the denoiser reads text.

    Shape:
        Latents are (B, C, h, w), also for FLUX, whose packing stays inside `predict`.
    """

    def __init__(
        self, pipeline: Any, lr: float = 1e-4, steps: int = 20, guidance: float = 3.0
    ) -> None:
        super().__init__()
        name = type(pipeline).__name__
        if name not in PIPELINES:
            raise ModelError(
                f"`pipeline` is a {name}, which is no supported text-to-image pipeline; "
                + suggest(name, PIPELINES)
            )
        if steps < 1:
            raise ConfigurationError(f"`steps` is {steps}, it must be at least 1")
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
        self.vae = pipeline.vae
        for part in (self.text_encoders, self.vae):
            part.requires_grad_(False)
        self.lr, self.steps, self.guidance = lr, steps, guidance
        self.guider: Guider | None = None
        self.source = ""
        chosen(self.family.text_layers(network), network)
        self.eval()

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
        """Whether guidance is an input of the network instead of a second pass (FLUX)."""
        return self.kind == "flux"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture in the family's native size."""
        config = self.network.config  # type: ignore[union-attr]
        channels = config.in_channels // 4 if self.family.packed else config.in_channels
        # FLUX has no size of its own; its pipeline's default is 128 latents, 1024 pixels.
        size = getattr(config, "sample_size", None) or self.pipeline.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @property
    def dtype_of_network(self) -> torch.dtype:
        """Floating type of the denoiser's weights."""
        return next(self.network.parameters()).dtype

    def require_full_precision(self, what: str) -> None:
        """Refuse half precision on the CPU, where many operations lack it or are very slow.

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
        """Embed prompts as the pipeline does.

        Raises:
            RequestError: a prompt is longer than a text encoder reads; nothing is truncated.
        """
        texts = list(prompts)
        self.check_length(texts)
        device = next(self.network.parameters()).device
        pipe = self.pipeline
        if self.kind == "sd":
            states, _ = pipe.encode_prompt(texts, device, 1, False)
            return PromptEmbedding(states)
        if self.kind == "sdxl":
            states, _, pooled, _ = pipe.encode_prompt(
                texts, device=device, do_classifier_free_guidance=False
            )
            return PromptEmbedding(states, pooled)
        if self.kind == "sd3":
            states, _, pooled, _ = pipe.encode_prompt(
                texts, None, None, device=device, do_classifier_free_guidance=False
            )
            return PromptEmbedding(states, pooled)
        states, pooled, _ = pipe.encode_prompt(texts, None, device=device)
        return PromptEmbedding(states, pooled)

    def unconditional(self) -> PromptEmbedding:
        """One row: what guidance leads away from. The empty text, but zeros for SDXL."""
        empty = self.encode([""])
        if self.kind == "sdxl" and self.pipeline.config.force_zeros_for_empty_prompt:
            assert empty.pooled is not None
            return PromptEmbedding(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
        return empty

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """Tokenizers that are in use, each with the longest prompt it takes."""
        pipe, found = self.pipeline, []
        for key in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(pipe, key, None)
            if tokenizer is None:
                continue
            limit = tokenizer.model_max_length
            if (self.kind, key) == ("sd3", "tokenizer_3") or (self.kind, key) == ("flux", "tokenizer_2"):
                limit = _default_of(pipe.encode_prompt, "max_sequence_length")
            elif self.kind in ("sd3", "flux"):
                limit = pipe.tokenizer_max_length
            found.append((tokenizer, int(limit)))
        return found

    def check_length(self, prompts: Sequence[str]) -> None:
        """Refuse prompts of which an encoder would only read the beginning.

        Raises:
            RequestError: names the prompt and both lengths.
        """
        for tokenizer, limit in self._tokenizers():
            for prompt in prompts:
                length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
                if length > limit:
                    raise RequestError(
                        f"the prompt '{prompt[:60]}{'…' if len(prompt) > 60 else ''}' has {length} "
                        f"tokens, the text encoder reads {limit}; shorten it"
                    )

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Which positions of the token states belong to which tokens, tokenizer by tokenizer."""
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
            rows = tokenizer(
                list(prompts), padding="max_length", max_length=limit, truncation=True
            ).input_ids
            plain = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
            begin = len(tokenizer("", add_special_tokens=True).input_ids) - 1
            ids = torch.tensor(rows)
            content = torch.zeros(ids.shape, dtype=torch.bool)
            for row, tokens in enumerate(plain):
                content[row, begin : begin + len(tokens)] = True
            found.append(Segment(start, ids, content, begin))
            start += limit
        return found

    def text_layers(self) -> list[TextLayer]:
        """Layers whose input is a function of the prompt alone, in forward order."""
        self._refuse_adapters()
        return chosen(self.family.text_layers(self.network), self.network)

    def _refuse_adapters(self) -> None:
        if getattr(self.network, "peft_config", None):
            raise ModelError(
                "the denoiser has LoRA adapters loaded "
                f"({', '.join(self.network.peft_config)}); "  # type: ignore[union-attr]
                "fuse or unload them first (`pipe.fuse_lora()`, `pipe.unload_lora_weights()`)"
            )

    def sites(self, kind: SiteKind) -> list[Site]:
        """Layers of the denoiser by function; see `mmforget.models.base.Sites`.

        ``cross_attention`` are the projections between text and picture, ``text_reading`` the
        closed-form sites, ``all`` every linear and convolutional layer.

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
                for name, module in self.network.named_modules()
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
        """Raw output of the denoiser: noise, velocity or flow.

        Args:
            noisy: (B, C, h, w) network input (see `SamplingStep`).
            time: (B,) or (), in the scheduler's units, 0 to 1000.
            embedding: of B prompts.
            guidance: embedded guidance of a distilled model; 1.0 is the neutral value.
        """
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
        if self.network.config.guidance_embeds:  # type: ignore[union-attr]
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
        """Mix (B, C, h, w) latents with noise at times (B,), scaled as a network input."""
        signal, level = self._levels(time, latents)
        return signal * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What a perfect network predicts for `noised(latents, noise, time)`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        signal, level = self._levels(time, latents)
        return signal * noise - level * latents

    def draw_times(self, count: int, draw: torch.Generator) -> Tensor:
        """(count,) training times, uniform over the noise levels."""
        if self.prediction == "flow":
            return (torch.rand(count, generator=draw) * 999 + 1).float()
        steps = self.pipeline.scheduler.config.num_train_timesteps
        return torch.randint(0, steps, (count,), generator=draw)

    # ---- pictures -------------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) images in [0, 1]; the mean of the posterior, without a draw."""
        config = self.vae.config
        posterior = self.vae.encode(images.to(self.vae.dtype) * 2 - 1)
        mean = posterior.latent_dist.mean if hasattr(posterior, "latent_dist") else posterior[0]
        shift = getattr(config, "shift_factor", None) or 0.0
        return cast(Tensor, (mean - shift) * config.scaling_factor)

    def to_images(self, latents: Tensor) -> Tensor:
        """Decode (B, C, h, w) latents to (B, 3, H, W) in [0, 1]."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        decoded = self.vae.decode(latents / config.scaling_factor + shift, return_dict=False)[0]
        return cast(Tensor, (decoded / 2 + 0.5).clamp(0, 1))

    def noise(self, prompts: Sequence[str], n: int, seed: int, first: int = 0) -> Tensor:
        """Starting noise (len(prompts) * n, C, h, w), drawn per picture on the CPU.

        Args:
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
            condition: prompts.
            n: pictures per prompt.
            seed: each picture depends on seed, prompt and its number only.
            steps, guidance: by default those of the constructor.
            batch_size: pictures at a time.
            progress: called with the number of pictures done after every batch.

        Returns:
            (len(condition) * n, 3, H, W) float32 in [0, 1], on the CPU.

        Raises:
            RequestError: a prompt is too long.
            ModelError: half precision on the CPU.
        """
        if isinstance(condition, str):
            raise RequestError(f"`condition` is the text '{condition}', give a list of prompts")
        self.require_full_precision("`generate`")
        prompts = list(condition)
        distinct = list(dict.fromkeys(prompts))
        table = self.encode(distinct)
        empty = self.unconditional()
        rows = [(distinct.index(p), p, number) for p in prompts for number in range(n)]
        made = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            noise = torch.cat([self.noise([p], 1, seed, first=number) for _, p, number in part])
            latents = self.sample(
                noise,
                table[torch.tensor([index for index, _, _ in part])],
                empty,
                steps=steps,
                guidance=guidance,
                draws=[generator(seed, "sampler", p, number) for _, p, number in part],
            )
            made.append(self.to_images(latents).float().cpu())
            if progress is not None:
                progress(start + len(part))
        return torch.cat(made)

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
    ) -> Tensor:
        """Denoise latents as the pipeline would.

        Args:
            noise: (B, C, h, w) standard normal; with `start`, latents at that step's noise level.
            embedding: of B prompts.
            empty: `unconditional`, one row.
            steps, guidance: by default those of the constructor.
            record: receives every step.
            draws: one generator per picture, for samplers that add noise.
            start: index of the first step.

        Returns:
            (B, C, h, w) latents.
        """
        steps = self.steps if steps is None else steps
        scale = self.guidance if guidance is None else guidance
        scheduler, times = self.schedule(steps, noise)
        rows = torch.zeros(len(noise), dtype=torch.long, device=empty.states.device)
        unconditional = empty[rows]
        further = self.guider.prepare(self) if self.guider is not None else None
        guided = scale > 1 and not self.distilled
        latents = noise if start else noise * getattr(scheduler, "init_noise_sigma", 1.0)
        state: dict[str, Tensor] = {}
        extra: dict[str, Any] = {}
        if draws is not None and "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = draws
        for number, time in enumerate(times[start:], start):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, time)
            if self.distilled:
                conditional = plain = self.predict(scaled, time, embedding, guidance=scale)
            elif guided or record is not None:
                both = PromptEmbedding.cat([unconditional, embedding])
                plain, conditional = self.predict(torch.cat([scaled] * 2), time, both).chunk(2)
            else:
                conditional = plain = self.predict(scaled, time, embedding)
            if record is not None:
                record(SamplingStep(scaled, time.expand(len(scaled)), conditional, plain))
            found = conditional
            if further is not None and guided:
                assert self.guider is not None
                more = torch.stack(
                    [self.predict(scaled, time, further[rows + k]) for k in range(len(further))]
                )
                found = self.guider.guide(number, conditional, plain, more, scale, state)
            elif guided:
                found = plain + scale * (conditional - plain)
            latents = scheduler.step(found, time, latents, return_dict=False, **extra)[0]
        return latents

    def schedule(self, steps: int, latents: Tensor) -> tuple[Any, Tensor]:
        """A scheduler of its own, prepared for `steps` steps, and its times."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        device, settings = latents.device, {}
        if self.kind in ("sd3", "flux"):
            side = 2 if self.family.packed else self.network.config.patch_size  # type: ignore[union-attr]
            tokens = (latents.shape[-2] // side) * (latents.shape[-1] // side)
            if scheduler.config.get("use_dynamic_shifting", None):
                settings["mu"] = _shift_of(scheduler.config, tokens, self.kind)
            if self.kind == "flux" and not scheduler.config.get("use_flow_sigmas", False):
                grid = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
                settings["sigmas"] = grid.tolist()
        if "sigmas" in settings:
            scheduler.set_timesteps(device=device, **settings)
        else:
            scheduler.set_timesteps(steps, device=device, **settings)
        return scheduler, scheduler.timesteps

    # ---- training -------------------------------------------------------------------------------

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Squared error of the prediction at one random time per sample.

        Args:
            batch: ``image`` (B, 3, H, W) in [0, 1], ``caption`` (list of B texts), ``id`` (B,),
                which keys the draws together with `current_epoch`.

        Returns:
            (B,) losses.
        """
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
        """
        self.pipeline.save_pretrained(folder, safe_serialization=True)
        if self.guider is not None:
            text = json.dumps(self.guider.to_dict(), indent=1, ensure_ascii=False)
            (Path(folder) / GUIDANCE_FILE).write_text(text + "\n", encoding="utf-8")

    def fresh(self, seed: int) -> Self:
        """The same architecture with a newly drawn denoiser; text encoders stay."""
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        network = type(self.network).from_config(self.network.config)  # type: ignore[attr-defined]
        torch.set_rng_state(state)
        parts = {k: v for k, v in self.pipeline.components.items() if k != self.component}
        parts = {k: copy.deepcopy(v) if isinstance(v, nn.Module) else v for k, v in parts.items()}
        extra = {"requires_safety_checker": False} if self.kind == "sd" else {}
        network = network.to(next(self.network.parameters()).device)
        if network.dtype != self.dtype_of_network:
            network = network.to(self.dtype_of_network)
        pipeline = type(self.pipeline)(**parts, **{self.component: network}, **extra)
        return type(self)(pipeline, self.lr, self.steps, self.guidance)


def load_generator(
    source: str | Path,
    torch_dtype: torch.dtype = torch.float32,
    steps: int = 20,
    guidance: float = 3.0,
    **settings: Any,
) -> DiffusionGenerator:
    """Load a text-to-image pipeline.

    Args:
        source: local diffusers folder, or hub id.
        torch_dtype: precision of the weights.
        steps, guidance: see `DiffusionGenerator`.
        settings: further arguments of `DiffusionPipeline.from_pretrained`, such as ``variant``.

    Raises:
        MissingFileError: a local path that is no diffusers folder.
        ModelError: another kind of pipeline.
        WeightsError: broken weights, or weights in a format that can execute code.
    """
    from diffusers import DiffusionPipeline

    path = Path(source).expanduser()
    local = path.exists() or str(source).startswith((".", "/", "~"))
    if local and not (path / "model_index.json").is_file():
        raise MissingFileError(
            f"'{source}' is no diffusers pipeline (it has no model_index.json); give a folder "
            "written by `pipe.save_pretrained`, or a hub id"
        )
    if local:
        name = json.loads((path / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        if name not in PIPELINES:
            raise ModelError(
                f"'{source}' holds a {name}, which is no supported text-to-image pipeline; "
                + suggest(name, PIPELINES)
            )
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(path) if local else str(source),
            torch_dtype=torch_dtype,
            use_safetensors=True,
            **settings,
        )
    except Exception as error:  # the libraries raise many kinds for broken files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"the pipeline '{source}' cannot be loaded: {first}; check that its files are complete "
            "and in safetensors format"
        ) from error
    model = DiffusionGenerator(pipeline, steps=steps, guidance=guidance)
    model.source = str(source)
    file = path / GUIDANCE_FILE
    if local and file.is_file():
        from mmforget.models.guidance import load_guidance

        model.guider = load_guidance(json.loads(file.read_text(encoding="utf-8")))
    return model


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
