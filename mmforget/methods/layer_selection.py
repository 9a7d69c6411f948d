"""Which layers of a generator are trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, suggest
from mmforget.models.base import Latents, frozen
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.generators.base import StyleBased

AUTOMATIC = re.compile(r"auto:([1-9][0-9]*)")
RANKING_POOL, RANKING_SAMPLES = 64, 8
RANKING_RATE = 0.01
"""Of the one step that the styles take."""


def trained_groups(
    model: Any, choice: str, guide: ConceptGuide | None = None, seed: int = 0
) -> list[str]:
    """Groups of layers that are trained.

    Args:
        model: the generator.
        choice: ``all``; ``mapping`` or ``synthesis`` of a style-based network; ``no_to_image`` for
            all but the last step to the picture; ``auto:k`` for the k groups that `ranked_groups`
            puts first; or group names, separated by commas.
        guide: for ``auto:k``.
        seed: of the latents for ``auto:k``.

    Raises:
        ConfigurationError: the network has no such groups, or there is no guide to rank them by.
    """
    groups = list(model.layer_groups())
    mapping = [name for name in groups if name.startswith("mapping")]
    to_image = [name for name in groups if "to_image" in name]
    if choice == "all":
        return groups
    if choice in ("mapping", "synthesis") and not mapping:
        raise ConfigurationError(
            f"`train_layers` is '{choice}', but this generator has no mapping network; its groups "
            f"are {', '.join(groups)}"
        )
    named = {
        "mapping": mapping,
        "synthesis": [name for name in groups if name not in mapping],
        "no_to_image": [name for name in groups if name not in to_image],
    }
    if choice in named:
        return named[choice]
    if choice.startswith("auto"):
        return _best_groups(model, choice, guide, seed)
    wanted = [part.strip() for part in choice.split(",") if part.strip()]
    for name in wanted:
        if name not in groups:
            raise ConfigurationError(
                f"`train_layers` has '{name}', {suggest(name, (*named, 'all', 'auto:k', *groups))}"
            )
    if not wanted:
        raise ConfigurationError(f"`train_layers` is '{choice}'; name at least one group")
    return wanted


def _best_groups(model: Any, choice: str, guide: ConceptGuide | None, seed: int) -> list[str]:
    groups = list(model.layer_groups())
    match = AUTOMATIC.fullmatch(choice)
    if match is None or int(match[1]) > len(groups):
        raise ConfigurationError(
            f"`train_layers` is '{choice}'; write 'auto:k' with a number k from 1 to {len(groups)}"
        )
    if guide is None:
        raise ConfigurationError(
            f"`train_layers` is '{choice}', which ranks layers by a guide, but there is none; name "
            "the groups"
        )
    scores = ranked_groups(model, guide, seed)
    best = list(scores)[: int(match[1])]
    return [name for name in groups if name in best]


def ranked_groups(model: Any, guide: ConceptGuide, seed: int = 0) -> dict[str, float]:
    """Rank the groups of a generator by how much they have to do with the guide's concepts.

    Of 64 latents, the 8 that show the concepts most are taken. In a style-based network their
    styles, one per layer, take one gradient step away from the concepts' words and towards those
    of their anchors; a group is as important as the mean change of the styles that it reads, and
    those that read none, such as the mapping, come last. In other networks a group is as important
    as the gradient of the same loss in its weights, relative to the size of the weights. The model
    is left as it is.

    Args:
        model: the generator.
        guide: knows the concepts.
        seed: of the latents.

    Returns:
        Scores by group, the largest first.

    Reference:
        Gal et al., StyleGAN-NADA: CLIP-guided domain adaptation of image generators, 2021,
        arXiv 2108.00946; they rank anew in every step, we do once.
    """
    guide.to(next(model.network.parameters()).device)
    with frozen(model.network):
        latents = _showing(model, guide, seed)
        if isinstance(model.network, StyleBased):
            scores = _by_styles(model, guide, latents)
        else:
            scores = _by_weights(model, guide, latents)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


@torch.no_grad()
def _showing(model: Any, guide: ConceptGuide, seed: int) -> Latents:
    latents: Latents = model.draw(RANKING_POOL, seed, purpose="-layers")
    parts = [
        guide.probabilities(model.synthesise(latents[start : start + RANKING_SAMPLES]))
        for start in range(0, RANKING_POOL, RANKING_SAMPLES)
    ]
    order = torch.cat(parts).amax(1).argsort(descending=True, stable=True).cpu()
    return latents[order[:RANKING_SAMPLES]]


def _towards_anchor(guide: ConceptGuide, images: Tensor) -> Tensor:
    """Mean similarity to the concepts' words, less that to their anchors."""
    return (guide.embed(images) @ (guide.targets - guide.anchors).T).mean()


def _by_weights(model: Any, guide: ConceptGuide, latents: Latents) -> dict[str, float]:
    groups = model.layer_groups()
    weights = dict(model.network.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(True)  # `frozen` puts it back
    loss = _towards_anchor(guide, model.synthesise(latents))
    slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    squares = {
        name: (
            0.0 if slope is None else float(slope.square().sum()),
            float(weight.detach().square().sum()),
        )
        for (name, weight), slope in zip(weights.items(), slopes, strict=True)
    }
    return {
        group: sum(squares[name][0] for name in names)
        / max(sum(squares[name][1] for name in names), torch.finfo(torch.float32).tiny)
        for group, names in groups.items()
    }


def _by_styles(model: Any, guide: ConceptGuide, latents: Latents) -> dict[str, float]:
    with torch.no_grad():
        given = model.mapped(latents, "w+")
    codes = given.codes.clone().requires_grad_(True)
    loss = _towards_anchor(guide, model.synthesise(given.moved(codes)))
    (slope,) = torch.autograd.grad(loss, [codes])
    change = (RANKING_RATE * slope).abs().mean(dim=(0, 2))
    readers = style_readers(model)
    return {
        group: float(change[sorted(layers)].mean()) if layers else 0.0
        for group, layers in readers.items()
    }


@torch.no_grad()
def style_readers(model: Any) -> dict[str, set[int]]:
    """Which of the styles of ``w+`` each group of a style-based generator reads.

    Found by a pass with styles that hold nothing but their own number.
    """
    network = model.network
    like = next(network.parameters())
    numbers = torch.arange(1, network.num_ws + 1, device=like.device, dtype=like.dtype)
    styles = numbers[None, :, None].expand(1, -1, network.style_size).clone()
    seen: dict[str, set[int]] = {}
    with _recorded(network, network.style_size, network.num_ws, seen):
        network.synthesise(styles, noise="none")
    owners = {name: group for group, names in model.layer_groups().items() for name in names}
    readers: dict[str, set[int]] = {group: set() for group in model.layer_groups()}
    for module, layers in seen.items():
        for name, group in owners.items():
            if name.startswith(f"{module}."):
                readers[group] |= layers
    return readers


@contextmanager
def _recorded(
    network: nn.Module, size: int, count: int, seen: dict[str, set[int]]
) -> Iterator[None]:
    """Note which modules without children are given a style that holds one number."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for value in args:
                if isinstance(value, Tensor) and value.shape == (1, size):
                    number = float(value[0, 0])
                    if (value == number).all() and number in range(1, count + 1):
                        seen.setdefault(name, set()).add(int(number) - 1)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in network.named_modules()
        if name and not list(module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
