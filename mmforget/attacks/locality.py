"""Locality of a memory: do different ways to one picture lead through the same place?

Methods that prune weights take for granted that a memory sits somewhere. If several embeddings
that draw the same picture are far apart, cause different activations, and lead to different masks
when each is used for locating, then closing one way leaves the others open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.embedding_inversion import memory_targets
from mmforget.attacks.report import Sampling
from mmforget.data.memorized import MemorizedSet
from mmforget.errors import ConfigurationError, DataError
from mmforget.methods.activation_statistics import collect, collect_each
from mmforget.methods.subspace_pruning import candidates, difference_masks
from mmforget.metrics.copying import CopySimilarity
from mmforget.models.base import PromptEmbedding, frozen
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.embedding_search import (
    EmbeddingSearch,
    embedding_scale,
    search_embeddings,
    starting_embeddings,
)
from mmforget.models.memory_layers import MemoryKind, MemoryLayer, memory_layers
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import derive, generator


@dataclass(frozen=True)
class LocalityReport:
    """How alike the ways to one picture are, beside those to different pictures.

    Where ``same`` is as far from chance as two locations of one thing should be, and ``different``
    is not, a memory has a place. None stands for what cannot be measured.

    Attributes:
        embeddings: per picture the number of embeddings that draw it.
        left_out: pictures that fewer than two embeddings draw.
        spread: mean distance of two embeddings: ``same``: that draw the same picture; ``starts``:
            that their searches started from; ``prompts``: of ordinary prompts.
        activations: per layer, mean distance of its inputs at one noise and the noisiest time:
            ``same``: for two embeddings of one picture; ``different``: for those of two pictures.
        agreement: per layer, mean intersection over union of the weights located from two
            embeddings alone: ``same`` and ``different`` as before, and ``chance``, what two random
            masks of the same size have. Layers in which both masks are empty do not count as
            agreement.
        settings: everything that shaped the numbers.
    """

    embeddings: dict[str, int]
    left_out: tuple[str, ...]
    spread: dict[str, float | None]
    activations: dict[str, dict[str, float | None]]
    agreement: dict[str, dict[str, float | None]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        return vars(self) | {"left_out": list(self.left_out)}


def memory_locality(
    model: DiffusionGenerator,
    memorized: MemorizedSet,
    similarity: CopySimilarity,
    *,
    count: int = 4,
    settings: EmbeddingSearch | None = None,
    thresholds: Mapping[str, float] | None = None,
    layers: MemoryKind = "ffn_out",
    ratio: float = 0.01,
    first_steps: int = 10,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> LocalityReport:
    """Find several embeddings for each memorized picture, and compare them in three ways.

    Weights are located as `SubspacePruning` does, with the empty prompt as the base, from one
    embedding at a time and all from the same noise.

    Args:
        model: any model that can still be made to draw the pictures; left as it is.
        memorized: prompts and pictures.
        similarity: what counts as a copy; only embeddings that draw one are compared.
        count: searches per picture, each from a random start of its own.
        settings: of the search, by default 50 steps; the last of its budgets counts, and its
            `restarts` and `seed` are replaced.
        thresholds: per picture; None takes the similarity's own for all, see also
            `EmbeddingAttackReport.thresholds`.
        layers: in which weights are located, see `mmforget.models.memory_layers`.
        ratio: share of the inputs of a row that are candidates.
        first_steps: number of sampling steps that locating looks at.
        guidance: scale for sampling; None takes the model's own.
        steps: of sampling; None takes the model's own.
        seed: of all draws.

    Raises:
        ConfigurationError: `count` below 2, a start that is not random, or a setting out of range.
        DataError: no memorized picture, or a picture without a threshold.
        CapabilityError: the denoiser has no such layers.

    Reference:
        Kowalczuk, Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch, Finding DoRI: Discovery of
        Retained Images in Diffusion Models, 2025, arXiv 2507.16880.
    """
    search = settings or EmbeddingSearch(budgets=(50,))
    if count < 2:
        raise ConfigurationError(f"`count` is {count}, it must be at least 2 to compare anything")
    if search.init != "random":
        raise ConfigurationError(
            f"`settings.init` is '{search.init}', but starts from one prompt are no ways of their "
            "own; use 'random'"
        )
    search = replace(search, budgets=search.budgets[-1:], restarts=1, seed=derive(seed, "locality"))
    places = memory_layers(model, layers)
    for layer in places:
        candidates(layer, ratio)
    targets = memory_targets("memorized", memorized)
    if not len(targets):
        raise DataError(
            "no memorized prompt has a picture, so that nothing can be searched for; give the "
            "training pictures of some prompts"
        )
    limits = thresholds or dict.fromkeys(targets.names, similarity.threshold)
    for name in targets.names:
        if name not in limits:
            raise DataError(f"`thresholds` has no entry for the picture '{name}'; add it")
    with torch.no_grad(), frozen(model):
        every = torch.arange(len(targets)).repeat_interleave(count)
        images, regions = targets.images[every], targets.regions[every]
        scale = embedding_scale(model, memorized.texts)
        begin, _ = starting_embeddings(model, images, search, scale=scale)
        found = search_embeddings(model, images, settings=search, regions=regions, scale=scale)
        ends = found.get(search.budgets[0])
        if ends is None:
            raise ConfigurationError(
                f"the search stopped being finite before {search.budgets[0]} steps; lower "
                "`settings.lr`"
            )
        keys = [(targets.names[row], number % count) for number, row in enumerate(every.tolist())]
        sampling = Sampling(
            derive(seed, "locality-pictures"),
            model.steps if steps is None else steps,
            guidance,
            max(1, search.max_rows // 2),
        )
        values = similarity(sampling.pictures(model, keys, ends).nan_to_num(), images, regions)
        own = {
            name: [
                number
                for number, row in enumerate(every.tolist())
                if row == place and values[number] >= limits[name]
            ]
            for place, name in enumerate(targets.names)
        }
        groups = [rows for rows in own.values() if len(rows) > 1]
        # One embedding of each picture: the way to another one.
        firsts = [rows[0] for rows in groups]
        captions = memorized.test.prompts or memorized.retain.prompts
        ordinary = model.encode(list(dict.fromkeys(captions))[: len(images)]) if captions else None
        pick = _picker(ends)
        same = [activation_distance(model, pick(rows), places, seed) for rows in groups]
        apart = activation_distance(model, pick(firsts), places, seed) if len(firsts) > 1 else {}
        masks = dict(
            zip(
                [row for rows in groups for row in rows],
                _located(
                    model,
                    pick([row for rows in groups for row in rows]),
                    places,
                    ratio,
                    steps=steps,
                    guidance=guidance,
                    first_steps=first_steps,
                    seed=derive(seed, "locality-locating"),
                )
                if groups
                else [],
                strict=True,
            )
        )
        near = [weight_agreement([masks[row] for row in rows]) for rows in groups]
        far = weight_agreement([masks[row] for row in firsts]) if len(firsts) > 1 else {}
    return LocalityReport(
        embeddings={name: len(rows) for name, rows in own.items()},
        left_out=tuple(name for name, rows in own.items() if len(rows) < 2),
        spread={
            "same": _mean([embedding_spread(pick(rows)) for rows in groups]),
            "starts": _mean([embedding_spread(_picker(begin)(rows)) for rows in groups]),
            "prompts": None if ordinary is None else _mean([embedding_spread(ordinary)]),
        },
        activations={
            layer.name: {
                "same": _mean([one[layer.name] for one in same]),
                "different": apart.get(layer.name),
            }
            for layer in places
        },
        agreement={
            layer.name: {
                "same": _mean([one[layer.weight_name]["agreement"] for one in near]),
                "different": far.get(layer.weight_name, {}).get("agreement"),
                "chance": _mean([one[layer.weight_name]["chance"] for one in near]),
            }
            for layer in places
        },
        settings={
            "search": search.to_dict() | {"seed": seed},
            "count": count,
            "layers": layers,
            "ratio": ratio,
            "first_steps": first_steps,
            "sampling_steps": sampling.steps,
            "guidance": model.guidance if guidance is None else guidance,
            "similarity": similarity.protocol(),
        },
    )


def embedding_spread(embedding: PromptEmbedding) -> float | None:
    """Mean distance of two token states.

    Args:
        embedding: K rows.

    Returns:
        None for fewer than two rows.
    """
    return _mean_distance(embedding.states)


@torch.no_grad()
def activation_distance(
    model: DiffusionGenerator,
    embedding: PromptEmbedding,
    layers: Sequence[MemoryLayer],
    seed: int = 0,
) -> dict[str, float | None]:
    """How differently embeddings activate a network at one noise and the noisiest sampling time.

    Args:
        model: the model.
        embedding: K rows, which run as one batch.
        layers: whose inputs are compared.
        seed: of the noise.

    Returns:
        Per layer the mean distance of the inputs for two embeddings; None for fewer than two.
    """
    draw = generator(seed, "locality-noise")
    noise = torch.randn(model.latent_shape, generator=draw)
    noise = noise.expand(len(embedding), -1, -1, -1).to(embedding.states.device)
    scheduler, times = model.schedule(model.steps, noise)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if hasattr(scheduler, "scale_model_input"):
        latents = scheduler.scale_model_input(latents, times[0])
    found: dict[str, float | None] = {}

    def hook(layer: MemoryLayer) -> Callable[[Any, tuple[Any, ...]], None]:
        def watch(module: Any, arguments: tuple[Any, ...]) -> None:
            found[layer.name] = _mean_distance(arguments[0][..., layer.columns])

        return watch

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(hook(layer)).remove)
        model.predict(latents, times[0], embedding, guidance=model.guidance)
    return found


def weight_agreement(masks: Sequence[WeightMask]) -> dict[str, dict[str, float | None]]:
    """How much the masks of one thing overlap, pair by pair.

    Args:
        masks: at least one, of the same network.

    Returns:
        Per parameter ``agreement``, mean intersection over union, and ``chance``, that of random
        masks with the same counts. Pairs that are both empty there are left out, and None means
        that all are.

    Raises:
        WeightsError: masks of different networks.
    """
    pairs = [one.iou(other) for one, other in combinations(masks, 2)]
    names = dict.fromkeys(name for mask in masks for name in mask.masks)
    return {
        name: {
            "agreement": _mean([pair.layers[name] for pair in pairs]),
            "chance": _mean([pair.chance[name] for pair in pairs]),
        }
        for name in names
    }


def _located(
    model: DiffusionGenerator,
    embedding: PromptEmbedding,
    layers: Sequence[MemoryLayer],
    ratio: float,
    **course: Any,
) -> list[WeightMask]:
    """A mask per embedding."""
    base = collect(model, [""], layers, numbers=[0], **course)
    each = collect_each(model, embedding, layers, numbers=[0] * len(embedding), **course)
    columns = {layer.weight_name: [layer.columns.start, layer.columns.stop] for layer in layers}
    return [
        WeightMask(
            model.component, difference_masks(layers, one, base, ratio), {"columns": columns}
        )
        for one in each
    ]


def _picker(embedding: PromptEmbedding) -> Callable[[Sequence[int]], PromptEmbedding]:
    def pick(rows: Sequence[int]) -> PromptEmbedding:
        return embedding[torch.tensor(rows, device=embedding.states.device)]

    return pick


def _mean_distance(values: Tensor) -> float | None:
    return float(torch.pdist(values.float().flatten(1)).mean()) if len(values) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of what was measured; None if nothing was."""
    known = torch.tensor([torch.nan if value is None else value for value in values])
    mean = float(known.nanmean())
    return None if mean != mean else mean
