"""How widely the attention to a prompt is spread: memorized prompts keep it on several tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.attacks.report import measured
from mmforget.detection.report import DetectionReport
from mmforget.detection.trajectory import ScoreTable, Trajectories, Watched
from mmforget.errors import CapabilityError, ConfigurationError, suggest
from mmforget.models.diffusion import DiffusionGenerator

EntropyKind = Literal["E", "D"]

LAYER = 3
"""Index of the layer that "E" reads: the fourth that runs, as in Stable Diffusion 1."""

LATE = 0.2
"""Share of the last steps that "D" reads: 10 of 50."""


def attention_entropy(
    model: DiffusionGenerator,
    prompts: Sequence[str],
    kind: EntropyKind = "D",
    *,
    n: int = 4,
    layer: int | None = None,
    sampling_steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> DetectionReport:
    r"""Score prompts by the entropy of the cross-attention.

    Per layer, the attention is averaged over heads and places, which leaves a distribution
    :math:`\bar a` over the tokens, with the entropy :math:`E = -\sum_j \bar a_j \log \bar a_j`.
    Ordinary prompts end up with almost everything on the begin token, memorized ones do not:
    higher is memorized. The passes without a prompt are left out.

    * ``E``: of one layer at the first step; cheap.
    * ``D``: mean entropy of the distribution averaged over layers, over the last fifth of the
      steps, plus by how much the part of the entropy from the end token onwards grew since the
      first step.

    The direction was found on Stable Diffusion 1. Small models whose begin token attracts no
    attention need not show it, least of all in ``E``; check with `DetectionReport.quality`.

    Only for UNets. In models with joint attention (Stable Diffusion 3, FLUX) picture and text share
    one softmax, so that there is no distribution over tokens.

    Args:
        model: the network; it is left as it is.
        prompts: texts, at least one.
        kind: see above.
        n: pictures per prompt.
        layer: index, in the order in which they run, of the layer for ``E``; None takes the fourth
            or, if there are fewer, the last.
        sampling_steps: of a whole trajectory; None takes the model's own number.
        guidance: None takes the model's own scale.
        seed: of the starting noise.
        batch_size: pictures at a time.

    Returns:
        `details` per prompt: ``layers``, the entropy per layer at the first step, and with ``D``
        also ``entropy`` and ``tail`` per step.

    Raises:
        CapabilityError: joint attention.
        ConfigurationError: an unknown kind or layer, or see `Trajectories`.
        RequestError, ModelError: see `Trajectories`.
        DivergenceError: a prediction is not finite.

    Reference:
        Ren, Li, Zeng, Xu, Lyu, Xing, Tang, Unveiling and mitigating memorization in text-to-image
        diffusion models through cross attention, 2024, arXiv 2403.11052.
    """
    if model.kind in ("sd3", "flux"):
        raise CapabilityError(
            f"{model.family.name} has joint attention of picture and text, without a distribution "
            "over tokens; the attention entropy is for Stable Diffusion 1, 2 and XL, use "
            "`noise_magnitude` here"
        )
    if kind not in get_args(EntropyKind):
        raise ConfigurationError(f"`kind` is '{kind}', {suggest(kind, get_args(EntropyKind))}")
    if kind == "D" and layer is not None:
        raise ConfigurationError("`layer` is for the kind 'E'; 'D' averages over all layers")
    names = list(dict.fromkeys(site.block for site in model.sites("cross_attention")))
    if layer is not None and not 0 <= layer < len(names):
        raise ConfigurationError(
            f"`layer` is {layer}, the network has the layers 0 to {len(names) - 1}"
        )
    watched = Trajectories(
        model, prompts, n, 1 if kind == "E" else "all", sampling_steps, guidance, seed, batch_size
    )
    count = len(watched.prompts) * n
    segment = model.segments(watched.prompts)[0]
    ends = (segment.begin + segment.content.sum(1)).repeat_interleave(n)
    entropy, tail = ScoreTable(count), ScoreTable(count)
    first: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    rows: slice | None = None

    def before(time: float, conditional: slice) -> None:
        nonlocal rows
        found.clear()
        rows = conditional

    def keep(name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if rows is not None:
                states = args[0] if args else kwargs["hidden_states"]
                text = kwargs["encoder_hidden_states"]
                found[name] = mean_attention(attention, states[rows], text[rows])

        return hook

    def observe(now: Watched) -> None:
        nonlocal rows
        rows = None  # further passes of a step, as some kinds of guidance make, do not count
        if now.number == 0:
            for name, part in found.items():
                own = first.setdefault(name, torch.zeros(count, dtype=torch.float64))
                own[now.rows] = torch.special.entr(part).sum(1).double().cpu()
        if kind == "E":
            return
        terms = torch.special.entr(torch.stack(list(found.values())).mean(0)).cpu()
        late = torch.arange(terms.shape[1])[None] >= ends[now.rows][:, None]
        entropy.add(now, terms.sum(1))
        tail.add(now, (terms * late).sum(1))

    with measured(model) as cost, ExitStack() as hooks:
        for name in names:
            module = model.network.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(keep(name), with_kwargs=True).remove)
        watched.watch(observe, before)
    order = list(first)
    by_layer = {name: value.view(-1, n).mean(1).tolist() for name, value in first.items()}
    details: dict[str, dict[str, Any]] = {
        prompt: {"layers": {name: by_layer[name][row] for name in order}}
        for row, prompt in enumerate(watched.prompts)
    }
    protocol: dict[str, Any] = {"kind": kind, "logarithm": "natural"}
    if kind == "E":
        chosen = order[min(LAYER, len(order) - 1) if layer is None else layer]
        scores = by_layer[chosen]
        protocol["layer"] = chosen
    else:
        every, tails = entropy.values(n), tail.values(n)
        last = max(1, round(LATE * every.shape[2]))
        growth = tails[:, :, -last:].mean(2) - tails[:, :, 0]
        scores = (every[:, :, -last:].mean(2) + growth).mean(1).tolist()
        protocol |= {"layers": order, "last_steps": last}
        for row, prompt in enumerate(watched.prompts):
            details[prompt]["entropy"] = every[row].mean(0).tolist()
            details[prompt]["tail"] = tails[row].mean(0).tolist()
    return DetectionReport(
        name="attention_entropy",
        scores=dict(zip(watched.prompts, scores, strict=True)),
        higher_is_memorized=True,
        protocol=protocol,
        settings=watched.settings(),
        details=details,
        queries=cost.queries,
        seconds=round(cost.seconds, 3),
    )


def mean_attention(attention: Any, states: Tensor, text: Tensor) -> Tensor:
    """Attention of all places and heads to the tokens, averaged.

    Fast attention does not return its probabilities, so they are computed once more from the
    layer's own weights.

    Args:
        attention: a cross-attention of diffusers.
        states: (B, Q, c) what the queries are made of.
        text: (B, L, d) what the keys are made of.

    Returns:
        (B, L) float32, rows sum to 1.
    """
    if attention.norm_cross:
        text = attention.norm_encoder_hidden_states(text)
    query, key = (
        part.unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for part in (attention.to_q(states), attention.to_k(text))
    )
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    if attention.norm_k is not None:
        key = attention.norm_k(key)
    scores = query.float() @ key.float().transpose(2, 3) * attention.scale
    return scores.softmax(3).mean((1, 2))
