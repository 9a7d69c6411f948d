"""NeMo: switch off the value neurons of the cross-attention that only memorized prompts excite."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.data.memorized import MemorizedSet
from mmforget.errors import ConfigurationError, DivergenceError, RequestError, suggest
from mmforget.methods.closed_form import thinned
from mmforget.methods.pruning import PruningMethod, base_prompts
from mmforget.models.base import Model, PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.memory_layers import memory_layers
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import generator

logger = logging.getLogger(__name__)

Blocks = Literal["down_and_mid", "all"]

FEW_PROMPTS = 100
"""Fewer ordinary prompts than this give poor means and deviations."""
MOST_ADDED = 1280
SCALES = (1 / 3, 1 / 3, 1 / 3)
MULTISCALE_SIDE = 44
"""Smallest side on which structural similarity at three scales is defined."""


class NeMo(PruningMethod):
    """Neuron memorization: find and switch off value neurons of the cross-attention.

    A neuron is an output of a layer that turns text into values. Its activation for a prompt is the
    mean magnitude over the prompt's tokens, and its score ``z`` the distance from the mean of
    ordinary prompts, in their standard deviations. Per prompt, neurons are blocked that have
    ``z > threshold`` or are among the ``k`` most active of their layer; the threshold falls and
    ``k`` grows until the prediction early in sampling is no longer what it was. What similarity
    counts as "no longer" is calibrated on ordinary prompts: the mean, plus one deviation, of the
    largest similarity among different seeds. Then layers, and after them neurons, are given back
    whose return changes nothing about that. The result is the union over prompts; rows of the value
    layers, with biases, are set to zero.

    In UNets the activations are a function of the prompt alone, so that no picture is drawn for
    them. In Stable Diffusion 3 and FLUX they also depend on the picture and are read off one
    evaluation at the first step, which goes beyond the paper. Similarities are taken from the
    conditional prediction alone; the paper calibrates with guidance and applies without.

    Blocking value neurons hides a memory rather than deleting it: an embedding found by
    optimisation brings it back (Finding DoRI, 2025, arXiv 2507.16880). Attack before you trust it.

    Reads no pictures. Reads the prompts of `memorized.retain`, unless `base` is given.

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`.
        base: ordinary prompts, best 1000 or more; None takes those of `memorized.retain`.
        blocks: ``down_and_mid`` as in the paper, or ``all``; the former means all where there are
            no such blocks.
        threshold: the ``z`` that the search begins with.
        threshold_min, threshold_step: where it ends, and by how much it falls.
        search: False blocks all neurons with ``z > threshold`` and stops there.
        refine: give back what is not needed.
        seeds: starting noises per prompt, at least 2.
        calibration: ordinary prompts that the similarity is calibrated on.
        limit: similarity, 0 to 1, instead of a calibrated one.
        at_step: sampling step whose prediction is compared, from 1.
        steps: sampling steps; None takes the model's.
        max_calls: tests of a blocked set in all, each one `seeds` times `at_step` evaluations; when
            they are used up, the rest is not refined.
        batch_size: pictures at a time.

    Raises:
        RequestError: no ordinary prompts, or one of them is memorized.
        CapabilityError: the network has no layers that turn text into values.
        ConfigurationError: a setting out of range.

    Reference:
        Hintersdorf et al., Finding NeMo: Localizing Neurons Responsible For Memorization in
        Diffusion Models, 2024, arXiv 2406.02366.
    """

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        base: Sequence[str] | None = None,
        blocks: Blocks = "down_and_mid",
        threshold: float = 5.0,
        threshold_min: float = 1.0,
        threshold_step: float = 0.25,
        search: bool = True,
        refine: bool = True,
        seeds: int = 10,
        calibration: int = 16,
        limit: float | None = None,
        at_step: int = 2,
        steps: int | None = None,
        max_calls: int = 2000,
        batch_size: int = 64,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        if blocks not in get_args(Blocks):
            raise ConfigurationError(f"`blocks` is '{blocks}', {suggest(blocks, get_args(Blocks))}")
        counts = {"calibration": calibration, "max_calls": max_calls, "batch_size": batch_size}
        for name, value in counts.items():
            if value < 1:
                raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")
        if seeds < 2:
            raise ConfigurationError(f"`seeds` is {seeds}, at least 2 are needed to compare")
        if not threshold_step > 0:
            raise ConfigurationError(f"`threshold_step` is {threshold_step}, it must be positive")
        if not threshold >= threshold_min:
            raise ConfigurationError(
                f"`threshold` is {threshold}, it must not be below `threshold_min`, {threshold_min}"
            )
        if limit is not None and not 0 < limit < 1:
            raise ConfigurationError(f"`limit` is {limit}, it must lie between 0 and 1")
        given = base_prompts(memorized, base)
        super().__init__(model, memorized, copy=copy, seed=seed)
        if given is None:
            given = tuple(dict.fromkeys(memorized.retain.prompts))
        if len(given) < 2:
            raise RequestError(
                f"NeMo compares with ordinary prompts, there are {len(given)}; give at least 2 as "
                "`base`, best 1000, or in `memorized.retain`"
            )
        if len(given) < FEW_PROMPTS:
            logger.warning(
                "NeMo has only %d ordinary prompts to compare with; 1000 or more are better",
                len(given),
            )
        total = self.model.steps if steps is None else steps
        if not 1 <= at_step <= total:
            raise ConfigurationError(
                f"`at_step` is {at_step}, it must be 1 to {total}, the number of sampling steps"
            )
        self.model.check_length(given)
        self.base, self.blocks, self.seeds, self.calibration = given, blocks, seeds, calibration
        self.threshold, self.threshold_min = threshold, threshold_min
        self.threshold_step, self.search, self.refine = threshold_step, search, refine
        self.limit, self.at_step, self.steps = limit, at_step, total
        self.max_calls, self.batch_size = max_calls, batch_size
        layers = memory_layers(self.model, "cross_value")
        early = [one for one in layers if one.name.startswith(("down_blocks.", "mid_block."))]
        self.layers = early if blocks == "down_and_mid" and early else layers

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the mask."""
        return {
            "layers": "cross_value",
            "base_count": len(self.base),
            "blocks": self.blocks,
            "threshold": self.threshold,
            "threshold_min": self.threshold_min,
            "threshold_step": self.threshold_step,
            "search": self.search,
            "refine": self.refine,
            "seeds": self.seeds,
            "calibration": self.calibration,
            "limit": self.limit,
            "at_step": self.at_step,
            "steps": self.steps,
            "max_calls": self.max_calls,
        }

    # ---- locating -------------------------------------------------------------------------------

    def locate(self) -> WeightMask:
        """Choose neurons prompt by prompt, and take the union."""
        texts = self.memorized.texts
        self.model.require_full_precision("NeMo")
        ordinary = self._activations(self.base)
        found = self._activations(texts)
        mean, deviation = ordinary.mean(0), ordinary.std(0).clamp(min=1e-6)
        scores = (found - mean).abs() / deviation
        blocked = scores > self.threshold
        if self.search:
            blocked = self._searched(texts, found, scores)
        self._report["neurons"] = {
            "chosen": int(blocked.any(0).sum()),
            "of": blocked.shape[1],
            "per_prompt": dict(zip(texts, blocked.sum(1).tolist(), strict=True)),
        }
        return self._as_mask(blocked.any(0))

    def _as_mask(self, neurons: Tensor) -> WeightMask:
        masks = {}
        for layer, chosen in zip(self.layers, self._parts(neurons), strict=True):
            for name, parameter in layer.module.named_parameters():
                shape = (-1, *[1] * (parameter.ndim - 1))
                masks[f"{layer.name}.{name}"] = (
                    chosen.reshape(shape).expand(parameter.shape).clone()
                )
        return self.described(masks, unit="row")

    def _parts(self, neurons: Tensor) -> tuple[Tensor, ...]:
        """Split (..., neurons of all layers) by layer."""
        return neurons.split([layer.module.out_features for layer in self.layers], dim=-1)

    @torch.no_grad()
    def _activations(self, prompts: Sequence[str]) -> Tensor:
        """(P, neurons) mean magnitudes over the tokens of each prompt."""
        model: DiffusionGenerator = self.model
        by_text_alone = {one.name for one in model.text_layers() if one.reads == "states"}
        direct = all(layer.name in by_text_alone for layer in self.layers)
        rows: list[Tensor] = []
        for start in range(0, len(prompts), self.batch_size):
            embedding = model.encode(prompts[start : start + self.batch_size])
            if direct:
                values = [layer.module(embedding.states) for layer in self.layers]
            else:
                values = self._answers(embedding)
            rows.append(torch.cat([v.float().abs().mean(1) for v in values], 1))
        found = torch.cat(rows)
        if not torch.isfinite(found).all():
            raise DivergenceError(
                "activations of value neurons are not finite; load the model with "
                "`torch_dtype=torch.float32`"
            )
        return found

    def _answers(self, embedding: PromptEmbedding) -> list[Tensor]:
        """Outputs of the layers, (B, L, out) each, at the first step of one noise."""
        heard: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.module.register_forward_hook(lambda m, a, out: heard.append(out))
                stack.callback(handle.remove)
            self._changes(embedding, [0] * len(embedding), at_step=1)
        return heard

    # ---- search ---------------------------------------------------------------------------------

    def _searched(self, texts: Sequence[str], found: Tensor, scores: Tensor) -> Tensor:
        """(P, neurons) bool: what has to be blocked for each prompt."""
        embedding = self.model.encode(texts)
        plain = self._all_changes(embedding, None)
        limit = self._calibrated() if self.limit is None else self.limit
        looks = _agreement_among(plain) > limit
        odd = [text for text, seen in zip(texts, looks.any(1).tolist(), strict=True) if not seen]
        if odd:
            logger.warning(
                "NeMo: the early predictions for %d of %d prompts, such as '%s', agree among seeds "
                "no more than those for ordinary prompts; all seeds are used for them",
                len(odd),
                len(texts),
                odd[0],
            )
        looks = torch.where(looks.any(1, keepdim=True), looks, True)
        calls = 0

        def likeness(rows: Tensor, blocked: Tensor) -> Tensor:
            """(R,) largest similarity to the unblocked prediction, over seeds that look."""
            nonlocal calls
            calls += len(rows)
            changed = self._all_changes(embedding[rows], blocked)
            flat = similarity(changed.flatten(0, 1), plain[rows].flatten(0, 1))
            return flat.view(len(rows), -1).masked_fill(~looks[rows], -1).amax(1)

        count = len(texts)
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        limits = torch.full((count,), limit)
        active, threshold, added = torch.arange(count), self.threshold, 0
        order = [part.argsort(dim=1, descending=True) for part in self._parts(found)]
        while len(active):
            top = [
                torch.zeros_like(o, dtype=torch.bool).scatter(1, o[:, :added], True) for o in order
            ]
            blocked[active] = ((scores > threshold) | torch.cat(top, 1))[active]
            reached = likeness(active, blocked[active]).cpu()
            limits[active] = reached.clamp(min=limit)
            ended = threshold <= self.threshold_min or added >= MOST_ADDED
            active = active[(reached > limit) & (not ended)]
            threshold, added = max(threshold - self.threshold_step, self.threshold_min), added + 1
        searched = int(blocked.any(0).sum())
        if self.refine:
            self._refined(blocked, scores, limits, likeness, lambda: calls < self.max_calls)
        self._report |= {
            "limit": limit,
            "looked_memorized": count - len(odd),
            "calls": calls,
            "neurons_before_refinement": searched,
        }
        return blocked

    def _refined(
        self, blocked: Tensor, scores: Tensor, limits: Tensor, likeness: Any, go_on: Any
    ) -> None:
        """Give back layers, then neurons, that are not needed; in place, all prompts in step."""
        edges = [0, *torch.tensor([len(p) for p in self._parts(blocked[0])]).cumsum(0).tolist()]
        for layer in reversed(range(len(self.layers))):
            part = torch.arange(edges[layer], edges[layer + 1])
            self._give_back(blocked, [part] * len(blocked), limits, likeness, go_on)
        # The least conspicuous neurons come first, so that what remains are the others.
        queues = [
            chosen.nonzero()[:, 0][own[chosen].argsort()].split(1)
            for chosen, own in zip(blocked.clone(), scores, strict=True)
        ]
        for place in range(max((len(queue) for queue in queues), default=0)):
            parts = [queue[place] if place < len(queue) else None for queue in queues]
            self._give_back(blocked, parts, limits, likeness, go_on)

    @staticmethod
    def _give_back(
        blocked: Tensor, parts: Sequence[Tensor | None], limits: Tensor, likeness: Any, go_on: Any
    ) -> None:
        """Free one group of neurons per prompt where the prediction stays changed without them."""
        rows = torch.tensor(
            [
                row
                for row, part in enumerate(parts)
                if part is not None and blocked[row, part].any()
            ],
            dtype=torch.long,
        )
        if not len(rows) or not go_on():
            return
        trial = blocked[rows]
        for number, row in enumerate(rows.tolist()):
            trial[number, parts[row]] = False
        kept = likeness(rows, trial).cpu() <= limits[rows]
        blocked[rows[kept]] = trial[kept.to(trial.device)]

    def _calibrated(self) -> float:
        """Mean and one deviation of how much the predictions for ordinary prompts agree."""
        rows = thinned(torch.arange(len(self.base)), self.calibration).tolist()
        embedding = self.model.encode([self.base[row] for row in rows])
        found = _agreement_among(self._all_changes(embedding, None))
        return float(found.mean() + found.std())

    # ---- predictions ----------------------------------------------------------------------------

    def _all_changes(self, embedding: PromptEmbedding, blocked: Tensor | None) -> Tensor:
        """(P, seeds, C, h, w): what the network would change, for each prompt and seed.

        Args:
            embedding: of P prompts.
            blocked: (P, neurons) bool, or None.
        """
        pairs = [(row, key) for row in range(len(embedding)) for key in range(self.seeds)]
        made = []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            rows = torch.tensor([row for row, _ in part])
            keep = None if blocked is None else (~blocked[rows]).to(embedding.states)
            where = rows.to(embedding.states.device)
            with self._blocking(keep):
                made.append(self._changes(embedding[where], [k for _, k in part], self.at_step))
        found = torch.cat(made)
        return found.view(len(embedding), self.seeds, *found.shape[1:])

    @contextmanager
    def _blocking(self, keep: Tensor | None) -> Iterator[None]:
        """Multiply the neurons of each row of the batch by `keep`, (B, neurons)."""
        with ExitStack() as stack:
            for layer, part in zip(
                self.layers, () if keep is None else self._parts(keep), strict=keep is not None
            ):

                def scaled(module: Any, inputs: Any, out: Tensor, part: Tensor = part) -> Tensor:
                    return out * part[:, None]

                stack.callback(layer.module.register_forward_hook(scaled).remove)
            yield

    @torch.no_grad()
    def _changes(self, embedding: PromptEmbedding, keys: Sequence[int], at_step: int) -> Tensor:
        """(B, C, h, w) predicted noise minus the noisy latents, at one step of sampling.

        Args:
            embedding: of B prompts.
            keys: B numbers of the starting noises.
            at_step: from 1.
        """
        model: DiffusionGenerator = self.model
        draws = [generator(self.seed, "locating", key) for key in keys]
        latents = torch.stack([torch.randn(model.latent_shape, generator=d) for d in draws])
        latents = latents.to(embedding.states)
        scheduler, times = model.schedule(self.steps, latents)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        extra: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = [generator(self.seed, "locating sampler", key) for key in keys]
        scale = model.guidance if model.distilled else 1.0
        for number, time in enumerate(times[:at_step], 1):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, time)
            found = model.predict(scaled, time, embedding, guidance=scale)
            self.spend(forget=len(found))
            if number < at_step:
                latents = scheduler.step(found, time, latents, return_dict=False, **extra)[0]
        return model.as_noise(found, scaled, time.expand(len(scaled))) - scaled


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of latents, each channel scaled to [0, 1] first.

    At three scales with equal weights where the sides are at least 44, as in the paper; below, at
    one scale, with an even window of about half the side, 3 to 7.

    Args:
        one: (B, C, h, w).
        other: (B, C, h, w).

    Returns:
        (B,), at most 1.
    """
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )

    one, other = _scaled(one), _scaled(other)
    found: object
    side = min(one.shape[-2:])
    if side >= MULTISCALE_SIDE:
        found = multiscale_structural_similarity_index_measure(
            one, other, betas=SCALES, reduction="none", data_range=1.0
        )
    else:
        window = max(3, min(7, (side // 2 - 1) // 2 * 2 + 1))
        found = structural_similarity_index_measure(
            one,
            other,
            gaussian_kernel=False,
            kernel_size=window,
            reduction="none",
            data_range=1.0,
        )
    assert isinstance(found, Tensor)  # what it is without `return_full_image`
    return found.reshape(len(one))


def _scaled(latents: Tensor) -> Tensor:
    latents = latents.float()
    low, high = latents.amin((2, 3), keepdim=True), latents.amax((2, 3), keepdim=True)
    return (latents - low) / (high - low).clamp(min=1e-12)


def _agreement_among(changes: Tensor) -> Tensor:
    """(P, seeds): for each seed its largest similarity to another one of the same prompt.

    Args:
        changes: (P, seeds, C, h, w).
    """
    prompts, seeds = changes.shape[:2]
    one, two = torch.triu_indices(seeds, seeds, 1)
    found = similarity(changes[:, one].flatten(0, 1), changes[:, two].flatten(0, 1))
    square = found.new_full((prompts, seeds, seeds), -1.0)
    square[:, one, two] = square[:, two, one] = found.view(prompts, -1)
    return square.amax(2).cpu()
