"""MANU: prune the neurons that tell pictures from text most where the forget set is concerned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.errors import CapabilityError, ConfigurationError, DivergenceError, NoOpError, suggest
from mmforget.methods.base import StatisticsMethod, samples
from mmforget.models.base import Answers, Batch, Model
from mmforget.models.ffn_sites import find_sites
from mmforget.models.multimodals.base import Part

FORGET, RETAIN = 0, 1
PICTURE, TEXT = 0, 1
ABSOLUTE, SUM, SQUARES, ACTIVE = range(4)
"""Sums over tokens: of sizes, of values, of squares, of how often a neuron is active."""

EPSILON = 1e-8
Across = Literal["part", "layer"]


class MANU(StatisticsMethod):
    r"""Zero the neurons that matter to the forget set more than to the rest, in both modalities.

    A neuron is an input ``z`` of the last matrix of a feed-forward block. Questions and true
    answers pass through the model twice, with and without their pictures (``m`` and ``t``), and
    with the means over all tokens of ``|z|`` (``A``), of ``|z| > threshold`` (``F``), of ``z^2``
    (``Q``) and the variances ``V``::

        I = |A_m - A_t| / (A_m + A_t + eps) + |F_m - F_t| / (F_m + F_t + eps)
            + sqrt(V_m + V_t) + sqrt(|Q_m - Q_t| / (Q_m + Q_t + eps))
        score = I(forget) / (I(retain) + eps)

    The columns of the neurons with the highest scores are set to zero. No gradients, one pass.
    Reads inputs and labels of both sets.

    The paper sums over tokens; we take means, because the version with pictures has more tokens.
    Where a tower sees no text, such as that for pictures, ``t`` is 0 and three of the four terms
    are constant, so that there the score is a ratio of spreads.

    Args:
        model, copy, seed: see `ForgettingMethod`.
        share: of the neurons that are taken out, above 0 and at most 1 (paper: 0.01 to 0.05).
        parts: where; ``language``, ``vision`` or both.
        threshold: size from which on a neuron counts as active, not negative (ours).
        across: rank the neurons of a part together, or those of every layer by themselves (ours).

    Raises:
        CapabilityError: the model answers no questions, or does not name its parts.
        ConfigurationError: a setting out of range, or parts without feed-forward blocks.

    Reference:
        Liu et al.: Modality-Aware Neuron Pruning for Unlearning in Multimodal Large Language
        Models, ACL 2025, arXiv 2502.15910.
    """

    requires: ClassVar[tuple[type, ...]] = (Answers,)
    access: ClassVar[DataAccess] = DataAccess(retain="statistics")
    summed: ClassVar[tuple[str, ...]] = ("sums", "tokens")

    sums: Tensor
    tokens: Tensor

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        share: float = 0.03,
        parts: Sequence[Part] = ("language", "vision"),
        threshold: float = 0.1,
        across: Across = "part",
    ) -> None:
        super().__init__(model, copy=copy, seed=seed)
        if not 0 < share <= 1:
            raise ConfigurationError(f"`share` is {share}; it must be above 0 and at most 1")
        if not threshold >= 0:
            raise ConfigurationError(f"`threshold` is {threshold}; it must not be negative")
        if across not in get_args(Across):
            raise ConfigurationError(f"`across` is '{across}', {suggest(across, get_args(Across))}")
        self.share, self.threshold, self.across = share, threshold, across
        self.parts = tuple(parts)
        self.layers = self._output_layers()
        size = sum(layer.in_features for layer in self.layers.values())
        self.register_buffer("sums", torch.zeros(2, 2, 4, size, dtype=torch.float64))
        self.register_buffer("tokens", torch.zeros(2, 2, len(self.layers), dtype=torch.float64))
        self._report: dict[str, Any] = {}

    def _output_layers(self) -> dict[str, nn.Linear]:
        """The last layer of every feed-forward block of the chosen parts, by name."""
        part = getattr(getattr(self.model, "family", None), "part", None)
        if part is None:
            raise CapabilityError(
                f"MANU takes out neurons of parts of the network, which "
                f"{type(self.model).__name__} does not tell apart; use a MultimodalLM"
            )
        unknown = set(self.parts) - {"language", "vision"}
        if isinstance(self.parts, str) or not self.parts or unknown:
            raise ConfigurationError(
                f"`parts` is {list(self.parts)}; name 'language', 'vision' or both"
            )
        last = {site.block: site for site in find_sites(self.model.network, "ffn", ())}
        found = {
            site.name: site.module
            for site in last.values()
            if part(site.name) in self.parts and isinstance(site.module, nn.Linear)
        }
        missing = set(self.parts) - {part(name) for name in found}
        if missing:
            raise ConfigurationError(
                f"`parts` names {', '.join(sorted(missing))}, where there is no feed-forward block "
                "of linear layers; leave it out"
            )
        return found

    # ---- the pass -------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Begin from nothing, also when an interrupted pass is resumed."""
        super().on_train_epoch_start()
        self.sums.zero_()
        self.tokens.zero_()

    @torch.no_grad()
    def accumulate(self, batch: Batch) -> None:
        """Hear the batch with and without pictures, forget and retain samples by themselves."""
        real = batch["weight"] > 0
        for role, chosen in ((FORGET, batch["forget"]), (RETAIN, ~batch["forget"])):
            rows = (real & chosen).nonzero().flatten().tolist()
            shown = [row for row in rows if batch["images"][row]]
            if shown:
                self._hear(_rows(batch, shown), role, PICTURE)
            if rows:
                self._hear(_rows(batch, rows) | {"images": [[] for _ in rows]}, role, TEXT)
        forget = samples({"weight": batch["weight"] * batch["forget"]})
        # with and without pictures
        self.spend(forget=2 * forget, retain=2 * (samples(batch) - forget))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate, and refuse what is not finite."""
        super().training_step(batch, batch_idx)
        if not torch.isfinite(self.sums.sum()):
            raise DivergenceError(
                f"MANU: the activations are not finite at step {batch_idx}; check the weights of "
                "the model"
            )

    def _hear(self, batch: Batch, role: int, modality: int) -> None:
        with self._watched(role, modality):
            self.model.answer_logits(batch)

    @contextmanager
    def _watched(self, role: int, modality: int) -> Iterator[None]:
        """Add what enters the layers to the sums of a role and a modality, padding left out."""
        seen: dict[str, Any] = {}

        def begin(_module: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
            seen["mask"] = inputs.get("attention_mask")

        def watch(row: int, place: slice, language: bool) -> Any:
            def hook(_module: nn.Module, args: Any) -> None:
                values = args[0].detach().double()
                mask = seen["mask"] if language else None
                values = values.flatten(0, -2) if mask is None else values[mask.bool()]
                own = self.sums[role, modality, :, place]
                own[ABSOLUTE] += values.abs().sum(dim=0)
                own[SUM] += values.sum(dim=0)
                own[SQUARES] += values.square().sum(dim=0)
                own[ACTIVE] += (values.abs() > self.threshold).sum(dim=0)
                self.tokens[role, modality, row] += len(values)

            return hook

        handles = [self.model.network.register_forward_pre_hook(begin, with_kwargs=True)]
        first = 0
        for row, (name, layer) in enumerate(self.layers.items()):
            place = slice(first, first + layer.in_features)
            language = self.model.family.part(name) == "language"
            handles.append(layer.register_forward_pre_hook(watch(row, place, language)))
            first += layer.in_features
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- the edit -------------------------------------------------------------------------------

    def scores(self) -> dict[str, Tensor]:
        """Per layer (width,) how much more its neurons matter to the forget set.

        Raises:
            ConfigurationError: the pass over the data has not been made, or lacks a group.
        """
        heard = self.tokens.sum(dim=(1, 2))
        if not (heard > 0).all():
            raise ConfigurationError(
                f"MANU has heard {int(heard[FORGET])} forget and {int(heard[RETAIN])} retain "
                "tokens and needs both; call `Trainer.fit(method, datamodule)` with the view "
                "'statistics' first"
            )
        found, first = {}, 0
        for row, (name, layer) in enumerate(self.layers.items()):
            place = slice(first, first + layer.in_features)
            both = [
                importance(self.sums[role, :, :, place], self.tokens[role, :, row])
                for role in (FORGET, RETAIN)
            ]
            found[name] = both[FORGET] / (both[RETAIN] + EPSILON)
            first += layer.in_features
        return found

    @torch.no_grad()
    def edit(self) -> None:
        """Zero the columns of the highest scores.

        Raises:
            ConfigurationError: see `scores`.
            NoOpError: the share is less than one neuron.
        """
        scores = self.scores()
        groups: dict[str, list[str]] = {}
        for name in scores:
            key = name if self.across == "layer" else self.model.family.part(name)
            groups.setdefault(key, []).append(name)
        removed = {}
        for key, names in groups.items():
            together = torch.cat([scores[name] for name in names])
            count = int(self.share * len(together))
            if not count:
                raise NoOpError(
                    f"MANU would take out no neuron: `share` is {self.share:g}, and '{key}' has "
                    f"{len(together)}; raise it"
                )
            chosen = torch.zeros(len(together), dtype=torch.bool, device=together.device)
            chosen[together.sort(descending=True, stable=True).indices[:count]] = True
            widths = [len(scores[name]) for name in names]
            for name, columns in zip(names, chosen.split(widths), strict=True):
                self.layers[name].weight[:, columns] = 0
                removed[name] = int(columns.sum())
        self._report = {"removed_neurons": removed, "neurons": sum(map(len, scores.values()))}

    def statistics(self) -> dict[str, Any]:
        """How many neurons each layer has lost."""
        return self._report


def importance(sums: Tensor, tokens: Tensor) -> Tensor:
    """How differently neurons act with and without pictures, and how widely; see `MANU`.

    Args:
        sums: (2, 4, width) with and without pictures: of sizes, values, squares and activity.
        tokens: (2,) numbers of tokens behind them.

    Returns:
        (width,), not negative.
    """
    mean = sums / tokens.clamp(min=1)[:, None, None]
    variance = (mean[:, SQUARES] - mean[:, SUM].square()).clamp(min=0)
    spread = variance.sum(dim=0).sqrt()
    return (
        _contrast(mean[:, ABSOLUTE])
        + _contrast(mean[:, ACTIVE])
        + spread
        + _contrast(mean[:, SQUARES]).sqrt()
    )


def _contrast(values: Tensor) -> Tensor:
    return (values[PICTURE] - values[TEXT]).abs() / (values[PICTURE] + values[TEXT] + EPSILON)


def _rows(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """Some of the rows of a batch."""
    found: Mapping[str, Any] = {
        key: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
        for key, value in batch.items()
    }
    return dict(found)
