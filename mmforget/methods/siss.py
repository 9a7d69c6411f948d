"""SISS: subtract the score of the memorized pictures from that of pictures to keep, by weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmforget.data.denoising import DenoisingRecords
from mmforget.data.memorized import MemorizedSet
from mmforget.errors import ConfigurationError
from mmforget.methods.base import OptimizerName
from mmforget.methods.memory_fine_tuning import EndlessRecords, MemoryFineTuning
from mmforget.methods.surrogates import check_surrogates, ordinary_surrogates
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Model
from mmforget.seeds import generator


class MixedPictures(EndlessRecords):
    """Noisy pictures that may have come from a picture to keep, or from one to forget.

    A record is a pair of a prompt and a memorized picture, under a draw of the picture to keep, of
    the side that the noisy picture comes from, of noise and time.

    Args:
        model, latents, prompt, seed: see `EndlessRecords`; the latents are the memorized ones.
        keep: per pair (k, C, h, w) latents that its prompt may show.
        share: of the noisy pictures that come from the memorized side, in [0, 1].
    """

    def __init__(
        self,
        model: Any,
        latents: Tensor,
        prompt: Tensor,
        seed: int,
        keep: Sequence[Tensor],
        share: float,
    ) -> None:
        super().__init__(model, latents, prompt, seed)
        self.keep, self.share = list(keep), share

    def made(self, index: Tensor) -> dict[str, Tensor]:
        """See `EndlessRecords.made`; besides a target to lead away from, and two weights."""
        rows, times, noise, keep, mixed = index % len(self), [], [], [], []
        for record, row in zip(index.tolist(), rows.tolist(), strict=True):
            draw = generator(self.seed, "siss", record)
            times.append(self.model.draw_times(1, draw))
            noise.append(torch.randn(self.latents.shape[1:], generator=draw))
            choices = self.keep[row]
            keep.append(choices[int(torch.randint(len(choices), (1,), generator=draw))])
            mixed.append(bool(torch.rand((), generator=draw) < self.share))
        time, kept, forget = torch.cat(times), torch.stack(keep), self.latents[rows]
        source = torch.where(torch.tensor(mixed)[:, None, None, None], forget, kept)
        noisy = self.model.noised(source, torch.stack(noise), time)
        # The noise that would lead to the same place from either picture.
        zero = torch.zeros_like(noisy)
        level = self.model.noised(zero, torch.ones_like(noisy), time)
        to_keep = (noisy - self.model.noised(kept, zero, time)) / level
        to_forget = (noisy - self.model.noised(forget, zero, time)) / level
        keep_weight, forget_weight = importance(to_keep, to_forget, self.share)
        return {
            "noisy": noisy,
            "time": time,
            "target": self.model.target(kept, to_keep, time),
            "away": self.model.target(forget, to_forget, time),
            "keep_weight": keep_weight,
            "forget_weight": forget_weight,
            "prompt": self.prompt[rows],
        }


def importance(to_keep: Tensor, to_forget: Tensor, share: float) -> tuple[Tensor, Tensor]:
    r"""Densities of a noisy picture from either side over that of their mixture.

    With :math:`r = q(x_t|forget) / q(x_t|keep)` and :math:`\lambda` the share, these are
    :math:`1 / ((1-\lambda) + \lambda r)` and :math:`1 / ((1-\lambda)/r + \lambda)`, computed by
    logarithms: `r` overflows for almost every picture.

    Args:
        to_keep: (B, ...) noise that leads to the noisy picture from the one to keep.
        to_forget: (B, ...) the same from the one to forget.
        share: of the mixture that comes from the one to forget, in [0, 1].

    Returns:
        (B,) weights of the side to keep, and of the side to forget; each at least 0.
    """
    squares = (one.double().square().flatten(1).sum(1) / 2 for one in (to_keep, to_forget))
    keep, forget = squares
    ratio = keep - forget
    ours = torch.tensor(math.log(share) if share else -math.inf, dtype=torch.float64)
    other = torch.tensor(math.log1p(-share) if share < 1 else -math.inf, dtype=torch.float64)
    keep_weight = (-torch.logaddexp(other, ours + ratio)).exp()
    forget_weight = (-torch.logaddexp(other - ratio, ours)).exp()
    return keep_weight.float(), forget_weight.float()


class SISS(MemoryFineTuning):
    r"""Subtracted Importance Sampled Scores: naive deletion and ascent on what is deleted, at once.

    Noisy pictures come from a mixture of a memorized picture and one that its prompt may show. For
    each, one pass of the denoiser serves two errors: that towards the picture to keep, which is
    lowered, and that towards the memorized one, which is raised, both weighted by how likely the
    noisy picture is to have come from there. The ascent is scaled so that its gradient has a fixed
    share of the norm of the other. Ordinary pictures with their captions are learnt besides [ours].

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`.
        surrogates: per name of a memorized picture (k, 3, H, W) pictures that its prompts may show,
            see `make_surrogates`; None deals out ordinary pictures.
        share: of the noisy pictures that come from the memorized ones, above 0 and below 1.
        ascent: norm of the ascent's gradient over that of the descent, 0 or more.
        batch_size: noisy pictures of the mixture per step, over all processes.
        lr, weight_decay, optimizer: see `MemoryFineTuning`.
        retain_batch_size, caption_dropout, clip, tolerance, check_every: see `MemoryFineTuning`.

    Raises:
        ConfigurationError: a setting out of range.
        DataError: pictures are missing, see `MemoryFineTuning`.

    Reference:
        S. Alberti, K. Hasanaliyev, M. Shah, S. Ermon: Data Unlearning in Diffusion Models, ICLR
        2025, arXiv 2503.01034.
    """

    reads_pictures: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        surrogates: Mapping[str, Tensor] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        share: float = 0.5,
        ascent: float = 0.1,
        batch_size: int = 4,
        lr: float = 1e-5,
        weight_decay: float = 1e-2,
        optimizer: OptimizerName = "adamw",
        retain_batch_size: int = 4,
        caption_dropout: float = 0.1,
        clip: float = 1.0,
        tolerance: float | None = 0.05,
        check_every: int = 100,
    ) -> None:
        if not 0 < share < 1:
            raise ConfigurationError(f"`share` is {share}, it must be above 0 and below 1")
        if not ascent >= 0:
            raise ConfigurationError(f"`ascent` is {ascent}, it must be 0 or more")
        at_least_one(batch_size=batch_size)
        self.share, self.ascent, self.batch_size = share, ascent, batch_size
        super().__init__(
            model,
            memorized,
            copy=copy,
            seed=seed,
            lr=lr,
            weight_decay=weight_decay,
            optimizer=optimizer,
            retain_batch_size=retain_batch_size,
            caption_dropout=caption_dropout,
            clip=clip,
            tolerance=tolerance,
            check_every=check_every,
        )
        if surrogates is None:
            surrogates = ordinary_surrogates(memorized, seed=seed)
        check_surrogates(memorized, surrogates)
        self.surrogates = dict(surrogates)

    def memory_records(self) -> tuple[DenoisingRecords, int]:
        """One pair per prompt and picture."""
        pairs = [(one.prompt, name) for one in self.memorized for name in one.images]
        names = list(dict.fromkeys(name for _, name in pairs))
        forget = self.encoded(torch.stack([self.memorized.images[name] for name in names]))
        keep = {name: self.encoded(self.surrogates[name]) for name in names}
        records = MixedPictures(
            self.model,
            torch.stack([forget[names.index(name)] for _, name in pairs]),
            torch.tensor([self.row_of[prompt] for prompt, _ in pairs]),
            self.seed,
            [keep[name] for _, name in pairs],
            self.share,
        )
        return records, self.batch_size

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Errors on ordinary pictures, towards pictures to keep, and away from the others."""
        terms, part = self.regression({"retain": batch["retain"]}), batch["memory"]
        found = self.predicted(part["noisy"], part["time"], self.memory_embedding(part))
        keep, forget = (
            self.global_mean(
                weight.to(found) * (found - goal).square().flatten(1).mean(1),
                part["weight"].to(found),
            )
            for goal, weight in (
                (part["target"], part["keep_weight"]),
                (part["away"], part["forget_weight"]),
            )
        )
        scale = self.scale(keep, forget) if self.ascent else 0.0
        return terms | {"memory": keep, "ascent": -scale * forget}

    def scale(self, keep: Tensor, forget: Tensor) -> Tensor:
        """Factor that gives the ascent its share of the norm of the descent."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norms = []
        for loss in (keep, forget):
            found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            flat = torch.cat([part.reshape(-1) for part in found if part is not None])
            if self.world_size > 1:  # the norm of the mean gradient, as the step will have it
                torch.distributed.all_reduce(flat)
            norms.append(flat.norm())
        return self.ascent * norms[0] / norms[1].clamp(min=torch.finfo(flat.dtype).tiny)

    def count(self, batch: Any) -> None:
        """Count the passes, with the two backward passes that weigh the terms."""
        super().count(batch)
        if self.ascent:
            self.spend(forget=4 * int(batch["memory"]["weight"].sum()))

    def statistics(self) -> dict[str, Any]:
        """What was read, and the weights of the terms."""
        return super().statistics() | {"share": self.share, "ascent": self.ascent}
