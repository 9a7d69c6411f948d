"""ClassDistillation: a class learns to draw what another one draws, in all weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.concept import ConceptSpec
from mmforget.data.hashing import uniform
from mmforget.data.latent_pool import LatentRecords
from mmforget.errors import ConfigurationError
from mmforget.methods.base import samples
from mmforget.methods.class_target import check_classes, classes_of, destinations
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.models.base import Latents, Model
from mmforget.models.generators.class_tables import ClassTable, class_tables, mixed_classes

RANDOM = "random"


class ClassDistillation(GeneratorMethod):
    """Train a class of a conditional generator to draw what another class draws.

    With k an erased class, k' its destination, j a kept class, G0 the original and G the tuned
    generator, minimises mean distances of pictures::

        forget_weight * d(G(z, k), G0(z, k')) + retain_weight * d(G(z, j), G0(z, j))
        + mixture_weight * d(G(z, e), G0(z, c))

    where e are rows around that of k, ``e_k + sigma * sum_i noise_i e_i`` (then c = k'), or between
    it and that of a kept class j (then c = j), so that its neighbourhood is closed as well. The
    class tables themselves stay as they are, unless `train_tables`: the other weights have to
    forget, and the old row, which everybody has who has the original, does not bring the class
    back. Compare `ClassRerouting`, which replaces the row only.

    Args:
        model: a generator with classes, such as `ImageGAN`.
        concepts: whose names are those of classes.
        guide: a CLIP model for finding the class if classes have no names, and the nearest one;
            None does without.
        alternatives: of the guide, see `ConceptGuide`.
        copy, seed, lr, batch_size, retain_batch_size: see `GeneratorMethod`.
        pool: latents of erased and of kept classes each.
        retain: distance of pictures, see `GeneratorMethod`; all but ``pixel`` need the guide.
        retain_weight, train_layers, clip: see `GeneratorMethod`.
        destination: name of a kept class; ``nearest``, see `destinations`; or ``random``, another
            kept class for each latent.
        forget_weight: see above.
        mixture_weight: see above; 0 leaves mixtures out.
        sigma: standard deviation of the weights of the other rows in that noise.
        train_tables: also train the class tables.

    Raises:
        CapabilityError: the generator has no classes, or no layer is found where they enter.
        RequestError: a concept names no class, or they name all.
        ConfigurationError: a setting out of range.

    Reference:
        Hinton et al., Distilling the knowledge in a neural network, 2015, arXiv 1503.02531. The
        arrangement is ours.
    """

    needs_guide: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource] | None = None,
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-3,
        batch_size: int = 32,
        retain_batch_size: int = 64,
        pool: int = 4096,
        retain: str = "pixel",
        retain_weight: float = 1.0,
        train_layers: str = "all",
        clip: float = 5.0,
        destination: str = "nearest",
        forget_weight: float = 1.0,
        mixture_weight: float = 0.5,
        sigma: float = 0.3,
        train_tables: bool = False,
    ) -> None:
        for name, value in (("forget_weight", forget_weight), ("mixture_weight", mixture_weight),
                            ("sigma", sigma)):  # fmt: skip
            if not value >= 0:
                raise ConfigurationError(f"`{name}` is {value}, it must be 0 or more")
        super().__init__(
            model, concepts, guide, alternatives, copy=copy, seed=seed, lr=lr,
            batch_size=batch_size, retain_batch_size=retain_batch_size, pool=pool, retain=retain,
            retain_weight=retain_weight, train_layers=train_layers, clip=clip,
        )  # fmt: skip
        check_classes("ClassDistillation", self.model)
        self._tables: list[ClassTable] = class_tables(self.model)
        known = self._guide[0] if self._guide else None
        self.destination, self.train_tables = destination, train_tables
        self.erased = classes_of(self.original, self.concepts, known, seed)
        self.kept_classes = [k for k in range(self.model.num_classes) if k not in self.erased]
        self.destinations: dict[int, int] = {}
        if destination != RANDOM:
            self.destinations = destinations(
                self.original, self.erased, self.concepts, destination, self._tables, known, RANDOM
            )
        self.forget_weight, self.mixture_weight = forget_weight, mixture_weight
        self.sigma = sigma
        if not train_tables:
            # Where class and latent share a weight, only the whole of it could stand still.
            weights = {t.parameter: t.rows.numel() for t in self._tables}
            still = {
                name
                for name, size in weights.items()
                if self.model.network.get_parameter(name).numel() == size
            }
            self._names = [name for name in self._names if name not in still]
            for name in still:
                self.model.network.get_parameter(name).requires_grad_(False)

    # ---- data -----------------------------------------------------------------------------------

    def _sort(self) -> None:
        """Latents of the erased classes, and of the kept ones."""
        self.records = {}
        for name, classes in (("forget", list(self.erased)), ("retain", self.kept_classes)):
            turn = torch.arange(self.pool_size) % len(classes)
            labels = torch.tensor(classes)[turn]
            drawn = self.original.draw(
                self.pool_size, self.seed, labels=labels, purpose=f"-pool-{name}"
            )
            self.records[name] = LatentRecords(drawn)
        found = Counter(self.erased.values())
        self.prevalence = {name: n / self.model.num_classes for name, n in found.items()}

    def _destined(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The classes that shall take the place of those of a batch."""
        labels = batch["label"]
        if self.destinations:
            table = torch.arange(self.model.num_classes)
            for number, to in self.destinations.items():
                table[number] = to
            return table.to(labels.device)[labels]
        turn = self._uniform(batch, "destination")
        kept = torch.tensor(self.kept_classes, device=labels.device)
        return kept[(turn * len(kept)).long().to(labels.device)]

    def _uniform(self, batch: Mapping[str, Tensor], *keys: int | str) -> Tensor:
        """One number in [0, 1) for each latent."""
        ids: np.ndarray = batch["id"].cpu().numpy()
        return torch.from_numpy(uniform(ids, self.seed, "class", *keys))

    # ---- training -------------------------------------------------------------------------------

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        gone, stays = batch["forget"], batch["retain"]
        erased, clear = self.drawn(gone), self.drawn(stays)
        target = self._destined(gone)
        wanted = self.kept(Latents(erased.codes, target))
        images = self.model.synthesise(Latents.cat([erased, clear]))
        n = len(erased)
        weight = gone["weight"].to(images)
        terms = {
            "forget": self.forget_weight
            * self.global_mean(self.distance(images[:n], wanted), weight),
            "retain": self.retained(images[n:], self.kept(clear), stays["weight"].to(images)),
        }
        if self.mixture_weight:
            mixture, nearest = self._mixture(gone, target)
            with mixed_classes(self._tables, mixture.to(images)):
                mixed = self.model.synthesise(erased)
            away = self.distance(mixed, self.kept(Latents(erased.codes, nearest)))
            terms["mixture"] = self.mixture_weight * self.global_mean(away, weight)
        return terms

    def _mixture(self, batch: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, K) of the classes, and the kept class that is nearest to each mixture.

        Every other latent is taken around the erased row, the others on the way to a kept one.
        """
        labels, count = batch["label"].cpu(), self.model.num_classes
        step = self.trainer.global_step
        own = F.one_hot(labels, count).double()
        turn = self._uniform(batch, "partner", step) * len(self.kept_classes)
        partner = torch.tensor(self.kept_classes)[turn.long()]
        share = self._uniform(batch, "share", step)[:, None]
        between = share * own + (1 - share) * F.one_hot(partner, count)
        cells = batch["id"].cpu()[:, None] * count + torch.arange(count)
        first, second = (self._uniform({"id": cells}, name, step) for name in ("length", "angle"))
        noise = (-2 * (1 - first).log()).sqrt() * (2 * torch.pi * second).cos()  # Box and Muller
        # Weights that sum to 1: only differences between rows are added.
        around = own + self.sigma * (noise - noise.mean(1, keepdim=True))
        is_around = self._uniform(batch, "kind", step) < 0.5
        mixture = torch.where(is_around[:, None], around, between)
        nearest = torch.where(is_around.to(target.device), target, partner.to(target.device))
        return mixture, nearest

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the generators."""
        forget, retain = samples(batch["forget"]), samples(batch["retain"])
        times = 2 if self.mixture_weight else 1
        self.spend(forget=times * forget, retain=retain, backward=True)
        self.spend(forget=times * forget, retain=retain)

    def statistics(self) -> dict[str, Any]:
        """The base's, the classes, and what takes their place."""
        names = self.model.class_names
        return super().statistics() | {
            "classes": {names[number]: target for number, target in self.erased.items()},
            "destinations": {
                names[number]: names[self.destinations[number]] if self.destinations else RANDOM
                for number in self.erased
            },
            "trained_tables": self.train_tables,
        }
