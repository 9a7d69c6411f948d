"""Adversarial training of a generator on pictures of its own: what two methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from mmforget.concept import ConceptSpec
from mmforget.data.latent_pool import LatentRecords
from mmforget.data.record_stream import RecordStream
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.models.base import Latents, Model, check_capabilities, frozen

FISHER_BATCHES = 32
FISHER_BATCH = 16


def hinge_terms(
    model: Any, latents: Latents, real: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a discriminator and of its generator, in one pass and for one backward pass.

    Args:
        model: an `ImageGAN` with its discriminator.
        latents: B of them, from which it draws.
        real: (N, 3, H, W) in [0, 1], what shall look real.
        labels: (N,) their classes, for a conditional generator.

    Returns:
        (N,) of the discriminator on `real`, (B,) on the drawn pictures, and (B,) of the generator;
        the gradient of the first two reaches the discriminator alone, that of the third the
        generator alone.

    Reference:
        Lim and Ye, Geometric GAN, 2017, arXiv 1705.02894.
    """
    judge: nn.Module = model.discriminator
    drawn, given = model.real({"image": model.synthesise(latents)}), model.real({"image": real})
    classes = None if latents.labels is None else latents.labels.to(drawn.device)
    both = None
    if classes is not None and labels is not None:
        both = torch.cat([labels.to(drawn.device), classes])
    scores = judge(torch.cat([given, drawn.detach()]), both)
    held = {name: parameter.detach() for name, parameter in judge.named_parameters()}
    fooled: Tensor = functional_call(judge, held, (drawn, classes))
    return torch.relu(1 - scores[: len(given)]), torch.relu(1 + scores[len(given) :]), -fooled


def fisher(model: Any, latents: Latents, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean squared gradients of the generator's loss, over small batches, of mean 1 over all.

    Args:
        model: an `ImageGAN` with its discriminator; nothing of it changes.
        latents: from which it draws.
        names: of the network's parameters.

    Reference:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2016,
        arXiv 1612.00796.
    """
    with frozen(model):
        weights = {name: model.network.get_parameter(name) for name in names}
        for weight in weights.values():
            weight.requires_grad_(True)
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with torch.enable_grad():
            for start in range(0, min(len(latents), FISHER_BATCHES * FISHER_BATCH), FISHER_BATCH):
                part = latents[start : start + FISHER_BATCH]
                images = model.real({"image": model.synthesise(part)})
                labels = None if part.labels is None else part.labels.to(images.device)
                loss = -model.discriminator(images, labels).mean()
                grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, grad in zip(sums, grads, strict=True):
                    if grad is not None:
                        sums[name] += grad.square()
    total = torch.stack([value.sum() for value in sums.values()]).sum()
    mean = total / sum(value.numel() for value in sums.values())
    return {name: value / mean.clamp(min=1e-30) for name, value in sums.items()}


class AdversarialMethod(GeneratorMethod):
    """Base of the methods that go on training a generator against its discriminator.

    What shall look real are pictures that the original generator draws; no data are needed. Steps
    get the streams `fake`, latents of the prior, and `real_stream`.

    Args:
        model: an `ImageGAN` with its discriminator, ``load_gan(..., discriminator=True)``.
        concepts, guide, alternatives, copy, seed: see `GeneratorMethod`.
        lr, batch_size, pool, bearing, clear, retain, retain_weight: see `GeneratorMethod`.
        train_layers, clip: see `GeneratorMethod`.
        negatives: (n, 3, H, W) in [0, 1], pictures with the concept, in place of those that the
            guide finds; for generators without classes.
        ewc_weight: of what keeps important weights where they are while the generator adapts to
            pictures with the concept.

    Raises:
        CapabilityError: the model has no discriminator.
        ConfigurationError: a setting out of range.
    """

    real_stream: str = "retain"

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None,
        copy: bool | Literal["auto"],
        seed: int,
        lr: float,
        batch_size: int,
        pool: int,
        bearing: float,
        clear: float,
        retain: str,
        retain_weight: float,
        train_layers: str,
        clip: float,
        negatives: Tensor | None,
        ewc_weight: float,
    ) -> None:
        check_capabilities(type(self).__name__, model, self.requires)
        if getattr(model, "discriminator", None) is None:
            raise CapabilityError(
                f"{type(self).__name__} needs the discriminator that the generator was trained "
                "against; load it with `load_gan(..., discriminator=True)`, or use TextToUnlearn"
            )
        if not ewc_weight >= 0:
            raise ConfigurationError(f"`ewc_weight` is {ewc_weight}, it must be 0 or more")
        if negatives is not None:
            self._check_negatives(model, negatives)
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, batch_size, pool,
            bearing, clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip
        self.model.discriminator.requires_grad_(True)
        self._negatives = (negatives,)
        self.ewc_weight = ewc_weight
        self._fisher: dict[str, Tensor] = {}

    @staticmethod
    def _check_negatives(model: Any, negatives: Tensor) -> None:
        if model.num_classes:
            raise ConfigurationError(
                "`negatives` are for generators without classes; leave them out, so that the guide "
                "finds them together with their classes"
            )
        wanted = (3, *model.resolution)
        if negatives.ndim != 4 or tuple(negatives.shape[1:]) != wanted or not len(negatives):
            raise ConfigurationError(
                f"`negatives` has the shape {tuple(negatives.shape)}, it must be (n, {wanted[0]}, "
                f"{wanted[1]}, {wanted[2]}), values in [0, 1]"
            )

    # ---- data -----------------------------------------------------------------------------------

    def _sort(self) -> None:
        super()._sort()
        pool = self.pool()
        self.records["fake"] = LatentRecords(pool)
        images = self._negatives[0]
        if images is not None:
            rows = torch.arange(len(images)) % len(pool)
            self.records["forget"] = LatentRecords(pool[rows], extra={"image": images.cpu()})

    def prepare(self) -> None:
        """Find out which weights matter."""
        self._fisher = fisher(self.original, self.pool(), self._names)
        self.spend(retain=3 * FISHER_BATCHES * FISHER_BATCH)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of latents of the prior, and of those of what shall look real."""
        names = ("fake", self.real_stream)
        records = {name: self.records[name] for name in names}
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        stream = RecordStream(records, dict.fromkeys(names, self.batch_size), self.seed, first)
        return DataLoader(stream, batch_size=None)

    def real(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What shall look real: given pictures, or what the original draws."""
        return batch["image"] if "image" in batch else self.kept(self.drawn(batch))

    # ---- training -------------------------------------------------------------------------------

    def adversarial(self, batch: Any) -> dict[str, Tensor]:
        """The terms of discriminator and generator."""
        fake, real = batch["fake"], batch[self.real_stream]
        # In training mode its spectral norms follow its weights. A resumed run may start within an
        # epoch, so that the hook at its beginning would be too early.
        self.model.discriminator.train()
        on_real, on_fake, fooled = hinge_terms(
            self.model, self.drawn(fake), self.real(real), real.get("label")
        )
        of_real, of_fake = real["weight"].to(on_real), fake["weight"].to(on_fake)
        return {
            "discriminator": self.global_mean(on_real, of_real)
            + self.global_mean(on_fake, of_fake),
            "generator": self.global_mean(fooled, of_fake),
        }

    def held(self, model: Any) -> Tensor:
        """How far a generator's important weights are from the original's, times its weight."""
        parts = [
            (
                self._fisher[name] * (model.network.get_parameter(name) - value.detach()).square()
            ).sum()
            for name, value in self.original.network.named_parameters()
            if name in self._fisher
        ]
        return self.ewc_weight * torch.stack(parts).sum()

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the generator."""
        real = samples(batch[self.real_stream])
        self.spend(retain=samples(batch["fake"]), backward=True)
        if self.real_stream == "forget":
            self.spend(forget=real)
        else:
            self.spend(retain=real)
