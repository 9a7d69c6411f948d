"""How much pictures changed for the eye: distances of the features of several layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mmforget.errors import ConfigurationError, DataError, ModelError, suggest
from mmforget.models.base import state_hash

EPSILON = 1e-10
JUDGE_STAGES = tuple(f"network.stages.{number}" for number in range(4))
"""The convolutional stages of the digit-world judge."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two times (B, 3, H, W) images in [0, 1] to (B,) distances."""


class LayerDistance:
    """Distance of the LPIPS type, of two pictures under one network.

    In every layer, the channels at a place are scaled to length 1; squared differences are summed
    over channels and averaged over places, and the layers are added up. Published LPIPS
    multiplies the channels with weights learned from human answers, so that values cannot be
    compared with it; without these weights, it is the paper's distance of a network "as it is".
    Pictures are compared in their own size.

    ::

        features = torchvision.models.alexnet(weights="DEFAULT").features
        network = nn.Sequential(Normalize(MEAN, STD), features)
        distance = LayerDistance(network, ["1.1", "1.4", "1.7", "1.9", "1.11"], "alexnet")

    Args:
        network: called with images (B, 3, H, W) in [0, 1]; it does its own normalisation.
        layers: qualified names of its layers with (B, C, h, w) outputs.
        name: for the record; None takes the name of the class.
        batch_size: pairs at a time.

    Attributes:
        hash: SHA-256 of the weights.

    Raises:
        ConfigurationError: no layer, or an unknown one.

    Reference:
        Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric, 2018,
        arXiv 1801.03924.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        name: str | None = None,
        batch_size: int = 128,
    ) -> None:
        known = dict(network.named_modules())
        for layer in layers:
            if layer not in known:
                raise ConfigurationError(
                    f"{type(network).__name__} has no layer '{layer}', "
                    f"{suggest(layer, [key for key in known if key])}"
                )
        if not layers:
            raise ConfigurationError("`layers` is empty; name at least one layer of the network")
        self.network, self.layers, self.batch_size = network.eval(), tuple(layers), batch_size
        self.name = name or type(network).__name__
        self.hash = state_hash(network)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return (B,) distances >= 0 in double precision on the CPU.

        Raises:
            DataError: the two have different shapes.
            ModelError: a layer is not called once per picture, or gives no (B, C, h, w).
        """
        _check_pair(first, second)
        parts = [
            self._distances(one, other)
            for one, other in zip(
                first.split(self.batch_size), second.split(self.batch_size), strict=True
            )
        ]
        return torch.cat(parts)

    def _distances(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros(len(first), dtype=torch.float64)
        if not len(first):
            return total
        for output in self._outputs(torch.cat([first, second])):
            unit = output.double() / (output.double().norm(dim=1, keepdim=True) + EPSILON)
            one, other = unit.split(len(first))
            total += (one - other).square().sum(1).mean((1, 2)).cpu()
        return total

    def _outputs(self, images: Tensor) -> list[Tensor]:
        found: dict[str, list[Any]] = {layer: [] for layer in self.layers}
        hooks = [
            self.network.get_submodule(layer).register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output)
            )
            for layer, seen in found.items()
        ]
        device = next((p.device for p in self.network.parameters()), images.device)
        try:
            self.network.eval()(images.to(device))
        finally:
            for hook in hooks:
                hook.remove()
        for layer, seen in found.items():
            if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim != 4:
                raise ModelError(
                    f"the layer '{layer}' of '{self.name}' was called {len(seen)} times or gives "
                    "no (B, C, h, w); name convolutional layers or stages"
                )
        return [seen[0] for seen in found.values()]


def shipped_distance() -> LayerDistance:
    """Distance under the stages of the digit-world judge."""
    from mmforget.metrics.judge import load_judge

    return LayerDistance(load_judge().classifier, JUDGE_STAGES, "digit_world judge")


class PerceptualDistance(Metric):
    """Mean perceptual distance of pairs of pictures.

    Args:
        distance: `LayerDistance` or another one; None takes `shipped_distance`.
    """

    full_state_update = False
    higher_is_better = None
    total: Tensor
    count: Tensor

    def __init__(self, distance: Distance | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._distance = (distance or shipped_distance(),)  # a tuple keeps a module out of ours
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def distance(self) -> Distance:
        """What is averaged."""
        return self._distance[0]

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add two times (B, 3, H, W) images in [0, 1], row by row the pairs."""
        _check_pair(first, second)
        if len(first):
            self.total += self.distance(first, second).double().sum().to(self.total.device)
            self.count += len(first)

    def compute(self) -> Tensor:
        """Return the mean.

        Raises:
            DataError: there was no pair.
        """
        if not self.count:
            raise DataError("the perceptual distance has seen no pictures; update it first")
        return self.total / self.count


class PairedChange(Metric):
    """Mean distance between original and edited pictures of the same seed, per group of prompts.

    High is wanted for the erased concept and low for the preserved ones; `worst` finds the
    preserved concept that suffered most.

    Args:
        groups: names of concepts or groups of prompts.
        distance: `LayerDistance` or another one; None takes `shipped_distance`.

    Raises:
        ConfigurationError: groups that are none or not distinct.
    """

    full_state_update = False
    higher_is_better = None
    total: Tensor
    count: Tensor

    def __init__(
        self, groups: Sequence[str], distance: Distance | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(groups, str) or not groups or len(set(groups)) != len(groups):
            raise ConfigurationError(f"`groups` is {groups!r}; give distinct names in a list")
        self.groups = tuple(groups)
        self._distance = (distance or shipped_distance(),)  # a tuple keeps a module out of ours
        size = len(self.groups)
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def distance(self) -> Distance:
        """What is averaged."""
        return self._distance[0]

    def update(self, original: Tensor, edited: Tensor, group: str) -> None:
        """Add two times (B, 3, H, W) images in [0, 1] of the same prompts and seeds.

        Raises:
            ConfigurationError: an unknown group.
            DataError: the two have different shapes.
        """
        if group not in self.groups:
            raise ConfigurationError(f"`group` is '{group}', {suggest(group, self.groups)}")
        _check_pair(original, edited)
        if len(original):
            row = self.groups.index(group)
            values = self.distance(original, edited).double()
            self.total[row] += values.sum().to(self.total.device)
            self.count[row] += len(original)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean distance of every group.

        Raises:
            DataError: a group has no pictures.
        """
        empty = [name for name, n in zip(self.groups, self.count.tolist(), strict=True) if not n]
        if empty:
            raise DataError(
                f"the paired change has seen no pictures of '{empty[0]}'; update it for every group"
            )
        return dict(zip(self.groups, (self.total / self.count).unbind(), strict=True))

    def worst(self, preserved: Sequence[str] | None = None) -> tuple[str, float]:
        """Return the most changed of the preserved groups and its mean distance.

        Args:
            preserved: groups to choose from; None takes all.

        Raises:
            ConfigurationError: an unknown group, or none at all.
            DataError: a group has no pictures.
        """
        names = self.groups if preserved is None else tuple(preserved)
        if not names:
            raise ConfigurationError("`preserved` is empty; name at least one group")
        for name in names:
            if name not in self.groups:
                raise ConfigurationError(
                    f"`preserved` names '{name}', {suggest(name, self.groups)}"
                )
        found = self.compute()
        most = max(names, key=lambda name: float(found[name]))
        return most, float(found[most])


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 4:
        raise DataError(
            f"pictures of shape {tuple(first.shape)} and {tuple(second.shape)} are no pairs; give "
            "two times (B, 3, H, W) with the same seeds"
        )
