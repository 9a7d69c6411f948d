"""The generator against the pipelines it wraps, and what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    DataError,
    DivergenceError,
    MissingFileError,
    ModelError,
    RequestError,
    WeightsError,
)
from mmforget.models.base import Batch, PromptEmbedding, state_hash
from mmforget.models.diffusion import DiffusionGenerator, SamplingStep, load_generator
from mmforget.seeds import generator
from mmforget.testing.conformance import check_model
from mmforget.testing.tiny_pipelines import LENGTH, TinyKind, tiny_pipeline

KINDS = get_args(TinyKind)
FAMILY_KINDS = ("sd", "sdxl", "sd3", "flux")
CAT, DOG = "a red cat", "a photo of a dog in van gogh style"


def made(kind: TinyKind, **settings: Any) -> DiffusionGenerator:
    """A tiny generator that a test may change."""
    return DiffusionGenerator(tiny_pipeline(kind), **({"steps": 2} | settings))


def theirs(model: DiffusionGenerator, prompt: str, n: int, seed: int, **settings: Any) -> Tensor:
    """The pictures of the pipeline's own call, with our noise."""
    pipe, latents = model.pipeline, model.noise([prompt], n, seed)
    pipe.set_progress_bar_config(disable=True)
    side = latents.shape[-1] * pipe.vae_scale_factor
    if model.kind == "flux":
        latents = pipe._pack_latents(latents, *latents.shape)
    return pipe(
        prompt,
        latents=latents,
        height=side,
        width=side,
        num_images_per_prompt=n,
        generator=[generator(seed, "sampler", prompt, number) for number in range(n)],
        num_inference_steps=settings.pop("steps", model.steps),
        guidance_scale=settings.pop("guidance", model.guidance),
        output_type="pt",
        **settings,
    ).images


@pytest.fixture
def batch() -> Batch:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    captions = [CAT, "a dog", "van gogh"]
    return {"image": images, "caption": captions, "id": torch.arange(3), "weight": torch.ones(3)}


# ---- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_pictures_are_those_of_the_pipeline(kind: TinyKind, guidance: float) -> None:
    model = made(kind, guidance=guidance)
    found = model.generate([CAT], 2, seed=3)
    assert found.shape == (2, 3, 16, 16) and found.std() > 0.05
    assert torch.equal(found, theirs(model, CAT, 2, 3))


@pytest.mark.parametrize(
    ("kind", "scheduler", "settings"),
    [
        ("sd2", "EulerDiscreteScheduler", {}),
        ("sdxl", "EulerAncestralDiscreteScheduler", {}),
        ("sd2", "DDPMScheduler", {}),
        ("sdxl", "DPMSolverMultistepScheduler", {}),
        ("sd", "PNDMScheduler", {"skip_prk_steps": True}),
        ("sdxl", "HeunDiscreteScheduler", {}),
    ],
)
def test_other_schedulers(kind: TinyKind, scheduler: str, settings: dict[str, Any]) -> None:
    model = made(kind, steps=3)
    pipe = model.pipeline
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    found = model.generate([CAT], 2, seed=1)
    assert torch.equal(found, theirs(model, CAT, 2, 1))
    assert torch.equal(model.generate([CAT], 2, seed=1), found)
    alone = model.generate([DOG, CAT], 1, seed=1, batch_size=1)[1]
    assert torch.allclose(alone, found[0], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sd3", {"use_dynamic_shifting": True}),
        ("sd3", {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0}),
        ("flux", {"use_dynamic_shifting": False, "shift": 1.0}),
        ("flux", {"use_karras_sigmas": True}),
        ("sd2", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ],
)
def test_schedules(kind: TinyKind, settings: dict[str, Any]) -> None:
    model = made(kind, steps=3)
    pipe = model.pipeline
    plain = model.generate([CAT], seed=1)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    found = model.generate([CAT], seed=1)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(found, theirs(model, CAT, 1, 1))


def replaced(kind: TinyKind, **settings: Any) -> DiffusionGenerator:
    """A tiny generator with another configuration of its denoiser."""
    pipe = tiny_pipeline(kind)
    name = "transformer" if kind == "flux" else "unet"
    network = getattr(pipe, name)
    torch.manual_seed(0)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    setattr(pipe, name, type(network).from_config(config | settings).eval())
    return DiffusionGenerator(pipe, steps=2)


def test_distilled_transformer_without_embedded_guidance() -> None:
    model = replaced("flux", guidance_embeds=False)
    found = model.generate([CAT], seed=1, guidance=3.0)
    assert torch.equal(found, theirs(model, CAT, 1, 1))
    assert torch.equal(found, model.generate([CAT], seed=1, guidance=1.0))


def test_distilled_unet() -> None:
    """Latent consistency models embed the guidance scale instead of predicting twice."""
    model = replaced("sd", time_cond_proj_dim=8)
    pipe = model.pipeline
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert model.distilled
    found = model.generate([CAT], 2, seed=1, guidance=8.0)
    assert torch.equal(found, theirs(model, CAT, 2, 1, guidance=8.0))
    assert not torch.allclose(found, model.generate([CAT], 2, seed=1, guidance=1.0), atol=1e-4)


def test_autoencoders_with_their_own_statistics() -> None:
    model = made("sdxl")
    plain = model.generate([CAT])
    model.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[2.0, 1.0, 0.5, 3])
    found = model.generate([CAT])
    assert not torch.allclose(plain, found, atol=1e-2)
    assert torch.equal(found, theirs(model, CAT, 1, 0))
    latents = torch.randn(2, 4, 8, 8)
    shift, spread = model._normalisation(latents)
    raw = latents * spread / model.vae.config.scaling_factor + shift
    images = torch.rand(2, 3, 16, 16)
    expected = model.vae.encode(images * 2 - 1).latent_dist.mean
    back = model.to_latents(images) * spread / model.vae.config.scaling_factor + shift
    assert torch.allclose(back, expected, atol=1e-5)
    assert torch.equal(
        model.to_images(latents), (model.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    )


def test_autoencoders_that_overflow_are_widened_for_a_moment() -> None:
    model = made("sdxl")
    latents = 3000 * model.noise([CAT], 1, 0)
    model.vae.to(torch.float16)
    model.vae.register_to_config(force_upcast=False)
    assert model.to_images(latents).dtype == torch.float16
    model.vae.register_to_config(force_upcast=True)
    found = model.to_images(latents)
    assert found.dtype == torch.float32 and model.vae.dtype == torch.float16
    model.vae.to(torch.float32)
    assert torch.equal(model.to_images(latents), found)


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_a_picture_depends_on_its_prompt_number_and_seed_only(kind: TinyKind) -> None:
    model = made(kind)
    both = model.generate([CAT, DOG], 3, seed=5)
    assert torch.allclose(model.generate([DOG], 2, seed=5), both[3:5], atol=1e-4)
    assert torch.allclose(
        model.generate([DOG, CAT], 3, seed=5, batch_size=2)[3:], both[:3], atol=1e-4
    )
    assert torch.equal(model.noise([DOG], 1, 5, first=2), model.noise([CAT, DOG], 3, 5)[5:])
    others = [model.generate([CAT], 3, seed=6), both[3:], both[[1, 2, 0]]]
    assert all(not torch.allclose(other, both[:3], atol=1e-3) for other in others)


def test_equal_prompts_are_encoded_and_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, done = made("sd"), [], []
    encode = model.encode

    def counted(prompts: list[str]) -> PromptEmbedding:
        seen.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(model, "encode", counted)
    found = model.generate([CAT, DOG, CAT], 3, seed=1, batch_size=2, progress=done.append)
    assert sorted(seen) == sorted(["", CAT, DOG])
    assert done == [2, 4, 6]
    assert found.shape[0] == 9 and torch.equal(found[:3], found[6:])
    assert torch.allclose(found[3:6], model.generate([DOG], 3, seed=1), atol=1e-4)


def test_the_global_generator_has_no_part() -> None:
    model = made("sdxl")
    torch.manual_seed(0)
    one = model.generate([CAT], seed=1)
    state = torch.get_rng_state()
    assert torch.equal(model.generate([CAT], seed=1), one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_trajectories(kind: TinyKind) -> None:
    model, steps = made(kind, steps=4), []
    noise, embedding = model.noise([CAT, DOG], 1, 0), model.encode([CAT, DOG])
    empty = model.unconditional()
    with torch.no_grad():
        end = model.sample(noise, embedding, empty, record=steps.append)
        assert len(steps) == 4 and all(isinstance(step, SamplingStep) for step in steps)
        for step in steps:
            assert step.time.shape == (2,)
            found = model.predict(step.noisy, step.time, embedding, guidance=3.0)
            assert torch.allclose(found, step.conditional, atol=1e-5)
            other = PromptEmbedding.cat([empty, empty]) if kind == "sd" else embedding
            found = model.predict(step.noisy, step.time, other, guidance=3.0)
            assert torch.allclose(found, step.unconditional, atol=1e-5)
        # from the third step's latents on (DDIM and flow do not scale their input)
        again = model.sample(steps[2].noisy, embedding, empty, start=2)
        assert torch.allclose(again, end, atol=1e-5)
        unguided = model.sample(noise, embedding, empty, guidance=1.0)
        recorded = model.sample(noise, embedding, empty, guidance=1.0, record=steps.append)
        assert torch.allclose(unguided, recorded, atol=1e-5)


class Halved:
    """Guidance at half its strength, which also asks for the prompt 'church'."""

    def prepare(self, model: DiffusionGenerator) -> PromptEmbedding:
        return model.encode(["church"])

    def guide(self, step, conditional, unconditional, further, scale, state):
        assert further.shape == (1, *conditional.shape)
        state["seen"] = torch.tensor(step)
        return unconditional + scale / 2 * (conditional - unconditional)

    def to_dict(self) -> dict[str, Any]:
        return {"guidance": "Halved"}


def test_guiders() -> None:
    model = made("sd")
    expected = model.generate([CAT], guidance=2.0)
    model.guider = Halved()
    assert torch.allclose(model.generate([CAT], guidance=4.0), expected, atol=1e-4)
    with pytest.raises(ConfigurationError, match=r"Halved changes classifier-free guidance.* 1;"):
        model.generate([CAT], guidance=1.0)
    model = made("flux")
    model.guider = Halved()
    with pytest.raises(ConfigurationError, match="none in a distilled model"):
        model.generate([CAT])


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_other_sizes(kind: TinyKind) -> None:
    model = made(kind, size=8)
    found = model.generate([CAT], 1, seed=2)
    assert found.shape == (1, 3, 8, 8)
    assert torch.equal(found, theirs(model, CAT, 1, 2))


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_noised_latents_are_the_schedulers_network_input(kind: TinyKind, scheduler: str) -> None:
    model = made(kind)
    pipe = model.pipeline
    pipe.scheduler = getattr(diffusers, scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="leading"
    )
    draw = generator(0, "test")
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=draw)
    own, times = model.schedule(5, latents)
    mixed = own.add_noise(latents, noise, times)
    scaled = [
        # which counts its steps, so that every row needs a new one
        model.schedule(5, latents)[0].scale_model_input(row[None], time)
        for row, time in zip(mixed, times, strict=True)
    ]
    assert torch.allclose(model.noised(latents, noise, times), torch.cat(scaled), atol=1e-5)
    reference = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    expected = reference.get_velocity(latents, noise, times.long())
    expected = expected if kind == "sd2" else noise
    assert torch.allclose(model.target(latents, noise, times), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flow(kind: TinyKind) -> None:
    model = made(kind)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator(0, "test"))
    own, times = model.schedule(3, latents)
    expected = own.scale_noise(latents, times, noise)
    found = model.noised(latents, noise, times)
    assert torch.allclose(found, expected, atol=1e-6)
    # a full step along the velocity leads from the noise to the picture
    level = (times / 1000)[:, None, None, None]
    velocity = model.target(latents, noise, times)
    assert torch.allclose(found - level * velocity, latents, atol=1e-5)
    drawn = model.draw_times(1000, generator(0, "test"))
    assert drawn.min() > 0 and drawn.max() <= 1000 and abs(drawn.mean() - 500) < 30


def test_training_times_cover_the_schedule() -> None:
    drawn = made("sd").draw_times(5000, generator(0, "test"))
    assert drawn.dtype == torch.int64 and drawn.min() < 5 and 995 <= drawn.max() <= 999


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_losses_are_those_of_single_samples(kind: TinyKind, batch: Batch) -> None:
    model = made(kind)
    torch.manual_seed(0)
    loss = model.loss(batch)
    assert loss.shape == (3,) and loss.requires_grad
    torch.manual_seed(1)
    rows = {key: value[1:2] for key, value in batch.items()}
    assert torch.allclose(model.loss(rows), loss[1:2], rtol=1e-4)
    with pytest.raises(DataError, match=r"has only image, id; add `caption`"):
        model.loss({"image": batch["image"], "id": batch["id"]})


def test_training_with_lightning(batch: Batch, quiet_trainer: Callable[..., Any]) -> None:
    """Only the denoiser changes, and the text encoders, one with dropout, stay in eval mode."""
    model = made("sd3", lr=1e-2)
    before = {name: state_hash(part) for name, part in model.named_children()}
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)]
    modes: list[bool] = []
    model.pipeline.text_encoder_3.register_forward_hook(
        lambda part, *_: modes.append(part.training)
    )
    quiet_trainer(fast_dev_run=True).fit(model, DataLoader(rows, batch_size=3))
    after = {name: state_hash(part) for name, part in model.named_children()}
    assert {name for name in before if before[name] != after[name]} == {"network"}
    assert modes and not any(modes)
    assert model.train().network.training and not model.text_encoders.training


def test_double_precision(batch: Batch) -> None:
    """Noise, times and embeddings follow the network, for exact comparisons of processes."""
    model = made("sd")
    single = model.generate([CAT], seed=1)
    model.to(torch.float64)
    assert model.noise([CAT], 1, 0).dtype == model.encode([CAT]).states.dtype == torch.float64
    assert model.loss(batch).dtype == torch.float64
    doubled = model.generate([CAT], seed=1)
    assert doubled.dtype == torch.float32 and torch.allclose(doubled, single, atol=1e-4)
    # what is still in single precision is brought to the network's
    found = model.predict(torch.randn(1, 4, 8, 8), torch.tensor([3]), made("sd").encode([CAT]))
    assert found.dtype == torch.float64


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_every_family_computes_in_double_precision(kind: TinyKind) -> None:
    model = made(kind, steps=1)
    single = model.generate([CAT])
    model.double()
    parts = [model.pipeline.vae, *(getattr(model.pipeline, key) for key in model.text_encoders)]
    assert {part.dtype for part in parts} == {torch.float64}
    assert torch.allclose(model.generate([CAT]), single, atol=1e-4)


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_pipeline(kind: TinyKind) -> None:
    model = made(kind)
    found = model.encode([CAT, ""])
    if kind in ("sd", "sd2"):
        expected = model.pipeline.encode_prompt([CAT, ""], "cpu", 1, True, ["", ""])[0]
        pooled = None
    elif kind == "flux":
        expected, pooled, _ = model.pipeline.encode_prompt([CAT, ""], None)
    else:
        third = {"prompt_3": None} if kind in ("sd3", "sd35") else {}
        expected, _, pooled, _ = model.pipeline.encode_prompt(
            prompt=[CAT, ""], prompt_2=None, do_classifier_free_guidance=True, **third
        )
    assert torch.equal(found.states, expected)
    assert (found.pooled is None) == (pooled is None)
    assert pooled is None or torch.equal(found.pooled, pooled)
    assert len(model.unconditional()) == 1
    if kind == "sdxl":
        assert not model.unconditional().states.any() and not model.unconditional().pooled.any()
        model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.allclose(model.unconditional().states, found.states[1:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_say_where_the_words_are(kind: TinyKind) -> None:
    """Changing one word changes the ids, and first of all the states, at its position."""
    model = made(kind)
    prompts, ids = [CAT, "a red dog", ""], {"clip": LENGTH, "t5": 512 if kind == "flux" else 256}
    segments, states = model.segments(prompts), model.encode(prompts).states
    names = {"flux": ["t5"], "sd3": ["clip", "t5"], "sd35": ["clip", "t5"]}.get(kind, ["clip"])
    assert [segment.ids.shape for segment in segments] == [(3, ids[name]) for name in names]
    assert sum(segment.ids.shape[1] for segment in segments) == states.shape[1]
    start = 0
    for name, segment in zip(names, segments, strict=True):
        assert segment.start == start and segment.begin == (1 if name == "clip" else 0)
        start += segment.ids.shape[1]
        assert segment.content.sum(1).tolist() == [3, 3, 0]
        changed = (segment.ids[0] != segment.ids[1]).nonzero().flatten().tolist()
        assert changed == [segment.begin + 2]
        place = segment.start + segment.begin
        if name == "clip":  # which reads from left to right
            assert torch.allclose(states[0, : place + 2], states[1, : place + 2], atol=1e-6)
        assert not torch.allclose(states[0, place + 2], states[1, place + 2], atol=1e-3)
    pipe = model.pipeline
    words = pipe.tokenizer_2 if kind == "flux" else pipe.tokenizer
    row = segments[0].ids[0][segments[0].content[0]].tolist()
    assert words.decode(row).split() == CAT.split()


def test_prompts_that_are_too_long() -> None:
    """Each tokenizer counts for itself, with its special tokens."""
    longest = " ".join(["cat"] * (LENGTH - 2))
    for kind in FAMILY_KINDS:
        model = made(kind)
        model.check_length([longest])
        for function in (model.encode, model.segments, model.generate, model.check_length):
            with pytest.raises(RequestError, match="has 17 tokens, the text encoder reads 16; sh"):
                function([CAT, longest + " dog"])
    # beyond CLIP, which reads the prompt of FLUX too, only T5 limits
    model.pipeline.tokenizer_max_length = 10_000
    model.check_length([" ".join(["cat"] * 511)])
    with pytest.raises(RequestError, match="has 513 tokens, the text encoder reads 512"):
        model.check_length([" ".join(["cat"] * 512)])


def test_transformers_without_t5() -> None:
    """The pipeline fills its place with zeros, also if its tokenizer is there."""
    pipe = tiny_pipeline("sd3")
    pipe.text_encoder_3 = None
    model = DiffusionGenerator(pipe, steps=2)
    assert [segment.ids.shape[1] for segment in model.segments([CAT])] == [LENGTH]
    assert not model.encode([CAT]).states[:, LENGTH:].any()
    assert torch.equal(model.generate([CAT], 1, 3), theirs(model, CAT, 1, 3))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_shorter_prompts_for_t5(kind: TinyKind) -> None:
    model = made(kind, max_sequence_length=20)
    found = model.generate([CAT], 1, 3)
    assert torch.equal(found, theirs(model, CAT, 1, 3, max_sequence_length=20))
    assert not torch.equal(found, made(kind).generate([CAT], 1, 3))
    rows = sum(segment.ids.shape[1] for segment in model.segments([CAT]))
    assert rows == model.encode([CAT]).states.shape[1] == (20 if kind == "flux" else LENGTH + 20)


@pytest.mark.parametrize("given", ["a cat", [], ["a cat", 7]])
def test_prompts_that_are_no_list_of_texts(given: Any) -> None:
    model = made("sd")
    for function in (model.encode, model.generate, model.check_length, model.segments):
        with pytest.raises(
            RequestError, match=r"give a list of texts|is empty|7 is no text"
        ) as error:
            function(given)
        assert "\n" not in str(error.value)


# ---- copies, saving, fresh weights --------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_copies_own_their_pipeline(kind: TinyKind) -> None:
    model = made(kind)
    before = model.generate([CAT])
    twin = copy.deepcopy(model)
    assert getattr(twin.pipeline, twin.component) is twin.network is not model.network
    assert twin.pipeline.vae is twin.vae is not model.vae
    for key, encoder in twin.text_encoders.items():
        assert getattr(twin.pipeline, key) is encoder is not model.text_encoders[key]
    assert torch.equal(twin.generate([CAT]), before)
    with torch.no_grad():
        for part in (twin.network, *twin.text_encoders.values()):
            for parameter in part.parameters():
                parameter.mul_(0.5)
    assert torch.equal(model.generate([CAT]), before)
    assert torch.equal(twin.generate([CAT], 1, 1), theirs(twin, CAT, 1, 1))
    assert not torch.allclose(twin.generate([CAT]), before, atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    ["sd", "flux", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sd3"))],
)
def test_conformance(kind: TinyKind, batch: Batch) -> None:
    check_model(made(kind, steps=2), batch, load=partial(load_generator, steps=2, size=16))


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_saved_folders(kind: TinyKind, tmp_path: Path, capfd: Any) -> None:
    """Silently, for mmforget and for diffusers."""
    model = made(kind, steps=2)
    model.save_native(tmp_path)
    loaded = load_generator(tmp_path, steps=2, size=16)
    assert state_hash(loaded) == state_hash(model) and loaded.source == str(tmp_path)
    assert capfd.readouterr().err == ""
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    plain = DiffusionGenerator(pipe, steps=2, size=16)
    assert torch.equal(theirs(plain, CAT, 1, 0), model.generate([CAT]))


def test_fresh_weights() -> None:
    model = made("sdxl", size=8)
    model.guider = Halved()
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    new = model.fresh(1)
    assert getattr(new.pipeline, "unet") is new.network  # noqa: B009
    assert state_hash(new.text_encoders) == state_hash(model.text_encoders)
    assert new.pipeline.text_encoder is not model.pipeline.text_encoder
    assert new.guider is None and new.size == 8 and not new.training
    assert not new.pipeline.config.force_zeros_for_empty_prompt
    assert not torch.allclose(new.generate([CAT]), made("sdxl", size=8).generate([CAT]), atol=1e-2)
    model.double()
    assert model.fresh(1).dtype_of_network == torch.float64


RELOAD = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmforget":
            raise ImportError("mmforget is blocked")
sys.meta_path.insert(0, Block())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
try:
    import mmforget
except ImportError:
    pass
else:
    raise SystemExit("mmforget could be imported")
pipe = DiffusionPipeline.from_pretrained(folder + "/pipe")
pipe.set_progress_bar_config(disable=True)
latents = load_file(folder + "/noise.safetensors")["noise"]
images = pipe("a red cat", latents=latents, num_inference_steps=3, guidance_scale=3.0,
              output_type="pt").images
save_file({"images": images}, folder + "/out.safetensors")
"""


@pytest.mark.slow  # a new interpreter imports diffusers
def test_other_programs_load_the_folder(tmp_path: Path) -> None:
    model = made("sd", steps=3)
    (tmp_path / "pipe").mkdir()
    model.save_native(tmp_path / "pipe")
    save_file({"noise": model.noise([CAT], 1, 4)}, tmp_path / "noise.safetensors")
    command = [sys.executable, "-I", "-c", RELOAD, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")["images"]
    assert torch.allclose(found, model.generate([CAT], 1, 4), atol=1e-5)


# ---- what is refused ----------------------------------------------------------------------------


def refused(kind: type[Exception], match: str, function: Callable[[], Any]) -> None:
    """One line that says what is wrong."""
    with pytest.raises(kind, match=match) as error:
        function()
    assert "\n" not in str(error.value)


def test_numbers_without_meaning() -> None:
    model = made("sd")
    for name in ("n", "steps", "batch_size"):
        refused(
            ConfigurationError,
            f"`{name}` is 0, it must be at least 1",
            partial(model.generate, [CAT], **{name: 0}),
        )
    refused(ConfigurationError, "`steps` is -1", partial(made, "sd", steps=-1))
    refused(ConfigurationError, "`size` is 9.*multiple of 2 pixels", partial(made, "sd", size=9))
    refused(ConfigurationError, "`size` is 10.*multiple of 4", partial(made, "flux", size=10))
    refused(ConfigurationError, "`size` is 0", partial(made, "sd3", size=0))
    for kind, length, why in (
        ("sd3", 0, "1 to 512"),
        ("flux", 513, "1 to 512"),
        ("sd", 8, "no T5"),
    ):
        settings = {"max_sequence_length": length}
        refused(
            ConfigurationError,
            f"`max_sequence_length` is {length}.*{why}",
            partial(made, cast(TinyKind, kind), **settings),
        )


def test_half_precision_on_the_processor() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = made("sd").to(dtype)
        message = "`generate` on the CPU needs single precision, the pipeline has .*float16; load"
        refused(ModelError, message, partial(model.generate, [CAT]))


def test_pictures_that_are_not_finite() -> None:
    model = made("sd")
    with torch.no_grad():
        model.network.conv_out.bias.fill_(float("nan"))
    refused(DivergenceError, "for 'a red cat' are not finite", partial(model.generate, [CAT]))


def test_incomplete_pipelines() -> None:
    for part, message in (
        ("unet", "has no unet; load the whole pipeline"),
        ("vae", "has no autoencoder"),
        ("text_encoder", "has no text encoder"),
    ):
        pipe = tiny_pipeline("sd")
        setattr(pipe, part, None)
        refused(
            ModelError,
            f"the StableDiffusionPipeline {message}",
            lambda p=pipe: DiffusionGenerator(p),
        )


def test_other_pipelines() -> None:
    pipe = diffusers.DDPMPipeline(nn.Identity(), diffusers.DDPMScheduler())
    refused(
        ModelError,
        "`pipeline` is a DDPMPipeline, which is no .*; supported are StableDiffusionPipeline,",
        lambda: DiffusionGenerator(pipe),
    )
    refused(ModelError, "`pipeline` is a NoneType", lambda: DiffusionGenerator(None))


def test_loaded_adapters() -> None:
    peft = pytest.importorskip("peft")
    pipe, model = tiny_pipeline("sd"), made("sd")
    config = peft.LoraConfig(r=2, target_modules=["to_k"])
    pipe.unet.add_adapter(config, adapter_name="mine")
    message = r"has LoRA adapters loaded \(mine\); take them out by `pipe.unload_lora_weights"
    refused(ModelError, message, lambda: DiffusionGenerator(pipe))
    model.network.add_adapter(config, adapter_name="mine")
    refused(ModelError, message, model.text_layers)
    refused(ModelError, message, partial(model.sites, "all"))
    model.pipeline.unload_lora_weights()
    assert len(model.text_layers()) == 8
    pipe = tiny_pipeline("sd")
    # not by `add_adapter`, for which transformers 5.24 wants a peft that is not out yet
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    pipe.text_encoder = peft.LoraModel(pipe.text_encoder, {"mine": config}, "mine").model
    pipe.text_encoder.peft_config = {"mine": config}
    refused(ModelError, message, lambda: DiffusionGenerator(pipe))


def test_networks_that_need_more_than_latents() -> None:
    """Inpainting UNets: their text layers can be edited, but pictures cannot be made."""
    model = replaced("sd", in_channels=9)
    assert len(model.text_layers()) == 8
    refused(
        ModelError, "takes 9 channels, but the autoencoder makes 4", partial(model.generate, [CAT])
    )


def test_unsupported_predictions() -> None:
    model = made("sd")
    config = model.pipeline.scheduler.config
    model.pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, prediction_type="sample")
    refused(ModelError, "prediction type 'sample'; supported are", lambda: model.prediction)


def test_unknown_kinds_of_layers() -> None:
    model = made("sd")
    for block in model.network.modules():
        if hasattr(block, "ff"):
            block.ff = nn.Identity()
    refused(CapabilityError, "has no layers of kind 'ffn'; choose", partial(model.sites, "ffn"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    made("sd").save_native(folder)
    return folder


UNET, TEXT, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


def truncate(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def drop(folder: Path, file: str) -> None:
    weights = load_file(folder / file)
    del weights[sorted(weights)[3]]
    save_file(weights, folder / file, metadata={"format": "pt"})


def reshape(folder: Path, file: str) -> None:
    weights = load_file(folder / file)
    weights[sorted(weights)[3]] = torch.ones(3)
    save_file(weights, folder / file, metadata={"format": "pt"})


def pickled(folder: Path, file: str) -> None:
    torch.save(load_file(folder / file), (folder / file).with_suffix(".bin"))
    if file == TEXT:
        (folder / file).with_suffix(".bin").rename(folder / "text_encoder/pytorch_model.bin")
    (folder / file).unlink()


def removed(folder: Path, file: str) -> None:
    (folder / file).unlink()


@pytest.mark.parametrize("file", [UNET, TEXT, VAE])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be loaded"),
        (drop, r"is not complete \((missing are|'\S*' is missing)"),
        (reshape, "cannot be loaded .*(shape|_norm)"),
        (pickled, "no file named.*safetensors"),
        (removed, "no file named.*safetensors"),
    ],
)
def test_damaged_weights(
    damage: Callable[[Path, str], None], message: str, file: str, saved: Path, tmp_path: Path
) -> None:
    """Libraries would draw missing weights at random and warn; unpickling could run anything."""
    folder = tmp_path / "pipe"
    shutil.copytree(saved, folder)
    damage(folder, file)
    refused(WeightsError, message, partial(load_generator, folder))


def test_damaged_folders(saved: Path, tmp_path: Path) -> None:
    refused(MissingFileError, "has no model_index.json", partial(load_generator, tmp_path))
    refused(MissingFileError, "is no diffusers pipeline", partial(load_generator, "./nothing"))
    index = tmp_path / "model_index.json"
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        refused(WeightsError, "is damaged, it names no pipeline", partial(load_generator, tmp_path))
    index.write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    refused(ModelError, "holds a DDPMPipeline, which is no", partial(load_generator, tmp_path))
    index.write_text((saved / "model_index.json").read_text())
    refused(WeightsError, "cannot be loaded", partial(load_generator, tmp_path))


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        "'nobody/no-such-model' is neither a folder nor a pipeline that can be had from the hub"
    )
    refused(MissingFileError, message, partial(load_generator, "nobody/no-such-model"))


def test_loading_leaves_the_libraries_as_they_were(saved: Path) -> None:
    """Their loggers and progress bars, also after an error."""
    from diffusers.utils import logging as tools

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]

    def state() -> list[Any]:
        return [(x.handlers[:], x.level, x.propagate) for x in loggers] + [tools._tqdm_active]

    before = state()
    load_generator(saved)
    refused(WeightsError, "bogus", partial(load_generator, saved, variant="bogus"))
    assert state() == before
    tools.disable_progress_bar()
    try:
        load_generator(saved)
        assert not tools._tqdm_active
    finally:
        tools.enable_progress_bar()
