"""What all audits of drawn pictures share: making them, comparing them, showing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mmforget.audit.examples import png
from mmforget.audit.intervals import bootstrap_mean, wilson
from mmforget.audit.protocol import changed_share
from mmforget.audit.results import ModelEntry
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import AuditedModel
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator

PIXELS = "mean absolute difference of pixels"

IDENTITY = "identity, other seeds"
"""Name of the control that is the original model with other noise."""


def drawer(audited: AuditedModel) -> DiffusionGenerator:
    """The model of an audit of pictures."""
    return cast(DiffusionGenerator, audited.model)


def as_audited(given: DiffusionGenerator | AuditedModel, role: str) -> AuditedModel:
    """A model with an entry; one that has none yet is named after its role."""
    if isinstance(given, AuditedModel):
        return given
    return AuditedModel(ModelEntry(role, role, source=given.source), given)  # type: ignore[arg-type]


def percent(value: float | None) -> str:
    """A share for people."""
    return "not measured" if value is None else f"{100 * value:.1f} %"


# ---- pictures ------------------------------------------------------------------------------------


def spread(prompts: Sequence[str], count: int) -> tuple[tuple[str, int], ...]:
    """`count` pictures over prompts, as evenly as it goes; equal prompts are numbered on."""
    used: dict[str, int] = {}
    rows = []
    for index in range(count):
        prompt = prompts[index % len(prompts)]
        rows.append((prompt, used.get(prompt, 0)))
        used[prompt] = used.get(prompt, 0) + 1
    return tuple(rows)


def plan_hash(
    parts: Sequence[tuple[str, Sequence[tuple[str, int]]]], sampling: Mapping[str, Any]
) -> str:
    """SHA-256 over all prompts, numbers and the settings of the sampler.

    Args:
        parts: name and rows of each group of pictures.
        sampling: settings.
    """
    body = [list(parts), dict(sampling)]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def render(
    model: DiffusionGenerator,
    rows: Sequence[tuple[str, int]],
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 64,
    empty: PromptEmbedding | None = None,
    done: Any = None,
) -> Tensor:
    """Make pictures, each from its prompt, its number and the seed alone.

    With `torch.distributed` running, every process makes its share and all get everything.

    Args:
        model: what draws.
        rows: prompt and number of each picture.
        seed: of noise and sampler.
        steps: of the sampler; None takes those of the model.
        guidance: its scale; None takes that of the model.
        batch_size: pictures at a time.
        empty: what guidance leads away from instead of the empty text, one row.
        done: called with the number of pictures after every batch.

    Returns:
        (len(rows), 3, H, W) uint8: pictures as a file would hold them.
    """
    model.require_full_precision("an audit")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    own = list(rows)[rank::world]
    distinct = list(dict.fromkeys(prompt for prompt, _ in own))
    table = model.encode(distinct) if distinct else None
    away = model.unconditional() if empty is None else empty
    made = []
    for start in range(0, len(own), batch_size):
        part = own[start : start + batch_size]
        assert table is not None
        wanted = table[torch.tensor([distinct.index(prompt) for prompt, _ in part])]
        latents = model.drawn(part, wanted, away, seed, steps, guidance)
        made.append((model.to_images(latents).float().cpu() * 255).round().byte())
        if done is not None:
            done(len(part))
    if not distributed:
        return torch.cat(made)
    shares: list[list[Tensor]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(shares, made)
    joined = [torch.cat(share) if share else None for share in shares]
    first = next(share for share in joined if share is not None)
    whole = torch.empty(len(rows), *first.shape[1:], dtype=torch.uint8)
    for index, share in enumerate(joined):
        if share is not None:
            whole[index::world] = share
    return whole


def floats(pictures: Tensor) -> Tensor:
    """uint8 pictures as float in [0, 1]."""
    return pictures.float() / 255


def as_bytes(pictures: Tensor) -> Tensor:
    """Float pictures in [0, 1] as uint8; what is not finite becomes black."""
    return (pictures.nan_to_num().clamp(0, 1) * 255).round().byte()


def strip(pictures: Tensor) -> str:
    """Pictures side by side, at most 256 pixels high, as base64 PNG.

    Args:
        pictures: (n, 3, H, W) uint8.
    """
    parts = floats(pictures)
    side = parts.shape[-2]
    if side > 256:
        size = (256, round(256 * parts.shape[-1] / side))
        parts = torch.nn.functional.interpolate(parts, size, mode="area")
    gap = max(1, parts.shape[-1] // 16)
    pieces: list[Tensor] = []
    for part in parts:
        if pieces:
            pieces.append(torch.ones(3, part.shape[1], gap))
        pieces.append(part)
    return png(torch.cat(pieces, dim=2))


# ---- rows ----------------------------------------------------------------------------------------


def pixel_change(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of each pair of pictures: (B, 3, H, W) twice to (B,)."""
    return (one - other).abs().flatten(1).mean(1).double()


def clip_scores(clip: Any, pictures: Tensor, prompts: Sequence[str], seed: int) -> Measured:
    """How well pictures fit their prompts.

    Args:
        clip: a `ClipModel`.
        pictures: (B, 3, H, W) float in [0, 1].
        prompts: B texts.
        seed: of the interval.
    """
    from mmforget.metrics.clip import CLIPScore

    values = CLIPScore(clip).per_sample(pictures, prompts).cpu().numpy()
    interval = bootstrap_mean(values, seed, "clip_score")
    return Measured(float(values.mean()), interval, len(values), per_sample=values)


def empty_pictures(pictures: Tensor) -> Measured:
    """Share of pictures that show nothing.

    Args:
        pictures: (B, 3, H, W) float in [0, 1].
    """
    from mmforget.metrics.vacuous import vacuous

    found = vacuous(pictures)
    empty = found["constant"] | found["noise"]
    details = {kind: int(hits.sum()) for kind, hits in found.items()}
    count = int(empty.sum())
    return Measured(count / len(empty), wilson(count, len(empty)), len(empty), details=details)


def add_costs(rows: Rows, original: AuditedModel, edited: Sequence[AuditedModel]) -> None:
    """Add what the entries of edited models say of their cost, and how much was changed."""
    before = dict(original.model.named_parameters())
    for one in edited:
        name = one.entry.name
        for metric in ("seconds", "sample_passes", "peak_memory_bytes", "edit_bytes"):
            if metric in one.entry.cost:
                rows.add(
                    metric, name, "",
                    lambda v=one.entry.cost[metric]: Measured(float(v)),  # type: ignore[misc]
                )  # fmt: skip
        rows.add(
            "changed_parameters", name, "",
            lambda m=one.model: Measured(changed_share(m, before)),  # type: ignore[misc]
        )  # fmt: skip
