"""The frame of the methods that repair a denoiser by fine-tuning instead of taking weights out."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.data.denoising import DenoisingRecords, made_pictures
from mmforget.data.memorized import MemorizedSet
from mmforget.data.record_stream import RecordStream
from mmforget.errors import ConfigurationError, DataError
from mmforget.methods.base import OptimizerName
from mmforget.methods.denoiser_training import DenoiserTraining
from mmforget.methods.memorization import MemorizationMethod
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Model, PromptEmbedding
from mmforget.seeds import generator

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Prompts that are embedded, and pictures that are encoded, at a time."""

HELD_OUT_DRAWS = 4
"""Draws of noise and time per held-out picture."""

EMPTY = 0
"""Row of the table of embeddings that stands for no prompt."""


class EndlessRecords(DenoisingRecords):
    """Records that are made when they are needed, so that no draw of noise ever comes twice.

    Record ``r`` is picture ``r % N`` under draw ``r // N``, which depends on the seed only; there
    is no last one. Nothing is stored but the clean latents.

    Args:
        model: a `DiffusionGenerator`.
        latents: (N, C, h, w) single precision, on the CPU.
        prompt: (N,) int64, rows of a table of embeddings.
        seed: of the draws.

    Raises:
        ConfigurationError: no pictures at all.
    """

    def __init__(self, model: Any, latents: Tensor, prompt: Tensor, seed: int) -> None:
        # The clean latents stand in for all that has one row per picture.
        super().__init__(latents, prompt, latents, prompt, ())
        self.model, self.latents, self.seed = model, latents, seed

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """One batch, as `DenoisingRecords` give it."""
        given = np.asarray(positions, dtype=np.int64)
        index = torch.from_numpy(np.where(given < 0, ~given, given))
        weight = torch.from_numpy((given >= 0).astype(np.float32))
        return {**self.made(index), "id": index, "weight": weight}

    @abstractmethod
    def made(self, index: Tensor) -> dict[str, Tensor]:
        """``noisy``, ``time``, ``target`` and ``prompt`` of some records.

        Args:
            index: (B,) int64, numbers of records.
        """


class NoisedPictures(EndlessRecords):
    """Pictures under noise, with the truth as target.

    Args:
        model, latents, prompt, seed: see `EndlessRecords`.
        purpose: what the draws are for.
        dropout: share of the records whose prompt becomes `EMPTY`, in [0, 1].
    """

    def __init__(
        self,
        model: Any,
        latents: Tensor,
        prompt: Tensor,
        seed: int,
        purpose: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(model, latents, prompt, seed)
        self.purpose, self.dropout = purpose, dropout

    def made(self, index: Tensor) -> dict[str, Tensor]:
        """See `EndlessRecords.made`."""
        draws = [generator(self.seed, self.purpose, record) for record in index.tolist()]
        time = torch.cat([self.model.draw_times(1, draw) for draw in draws])
        noise = torch.stack([torch.randn(self.latents.shape[1:], generator=d) for d in draws])
        dropped = torch.cat([torch.rand(1, generator=draw) for draw in draws]) < self.dropout
        clean = self.latents[index % len(self)]
        return {
            "noisy": self.model.noised(clean, noise, time),
            "time": time,
            "target": self.model.target(clean, noise, time),
            "prompt": self.prompt[index % len(self)].masked_fill(dropped, EMPTY),
        }


class EndlessStream(RecordStream):
    """Batches in which `EndlessRecords` come with another draw in every pass."""

    def positions(self, name: str, step: int) -> Tensor:
        """Records of a set that are used in a step, over all processes."""
        rows, total = super().positions(name, step), len(self.records[name])
        if not isinstance(self.records[name], EndlessRecords):
            return rows
        place = step * self.sizes[name] + torch.arange(self.sizes[name])
        return rows + place // total * total


class MemoryFineTuning(DenoiserTraining, MemorizationMethod):
    """Base of the methods that train the denoiser on ordinary pictures, and on something besides.

    Ordinary pictures are those of `MemorizedSet.retain`; where it has captions only, the frozen
    model draws them. Some are held out: the denoising error on them is looked at from time to time,
    on the same draws, and a run that damages the model ends early. `MemorizedSet.test` is never
    touched. Text encoders and autoencoder stay as they are. Pictures are encoded once.
    ``Trainer(max_steps=500).fit(method)`` needs no data module.

    Class attributes:
        reads_pictures: whether the method must have the memorized pictures, not only the prompts.

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`.
        lr, weight_decay, optimizer: see `GradientMethod`. The learning rate falls to a tenth along
            a cosine over all steps.
        retain_batch_size: ordinary pictures per step, over all processes.
        caption_dropout: share of them, in [0, 1), with the empty caption, so that guidance keeps
            what it leads away from.
        clip: largest norm of a step's gradient, unless the trainer has a `gradient_clip_val`.
        tolerance: relative rise of the held-out error that ends a run, 0.05 for 5 %; None lets it
            run.
        check_every: steps between two looks at the held-out error.

    Raises:
        ConfigurationError: a setting out of range.
        DataError: no ordinary captions, or a picture that a memorized prompt needs is missing.
        ModelError: half precision on the CPU.

    Note for subclasses: `trained` is called by this constructor, so set what it needs before.
    """

    view: ClassVar[View | None] = "paired"
    access: ClassVar[DataAccess] = DataAccess(
        forget_inputs=False, forget_labels=False, retain="full", retain_labels=False
    )
    reads_pictures: ClassVar[bool] = False
    stopped_at: Tensor
    errors: Tensor

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-5,
        weight_decay: float = 1e-2,
        optimizer: OptimizerName = "adamw",
        retain_batch_size: int = 4,
        caption_dropout: float = 0.1,
        clip: float = 1.0,
        tolerance: float | None = 0.05,
        check_every: int = 100,
    ) -> None:
        MemorizationMethod.__init__(self, model, memorized, copy=copy, seed=seed)
        at_least_one(retain_batch_size=retain_batch_size, check_every=check_every)
        if not 0 <= caption_dropout < 1:
            raise ConfigurationError(
                f"`caption_dropout` is {caption_dropout}, it must be at least 0 and below 1"
            )
        if tolerance is not None and not tolerance > 0:
            raise ConfigurationError(f"`tolerance` is {tolerance}, it must be positive, or None")
        if len(memorized.retain) < 2:
            raise DataError(
                f"`memorized.retain` has {len(memorized.retain)} captions, {type(self).__name__} "
                "needs at least 2, better hundreds; give ordinary captions, with pictures if there "
                "are any"
            )
        if self.reads_pictures:
            missing = [one.prompt for one in memorized if not one.images]
            if missing:
                raise DataError(
                    f"the prompt '{missing[0][:60]}' has no picture, which {type(self).__name__} "
                    f"must have ({len(missing)} of {len(memorized)} prompts); add them, or take "
                    "the prompts that have one with `memorized.only`"
                )
        self.model.check_length(memorized.retain.prompts)
        self.retain_batch_size, self.caption_dropout = retain_batch_size, caption_dropout
        self.tolerance, self.check_every = tolerance, check_every
        self.records: dict[str, DenoisingRecords] = {}
        self.register_buffer("stopped_at", torch.zeros((), dtype=torch.int64))
        # Held-out error at the start and at the last look.
        self.register_buffer("errors", torch.full((2,), float("nan"), dtype=torch.float64))
        self.prepare(lr, weight_decay, optimizer, clip)

    # ---- for subclasses -------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """By default all parameters of the denoiser."""
        return list(self.model.network.parameters())

    def memory_records(self) -> tuple[DenoisingRecords, int] | None:
        """What is learnt about the memorized prompts, and how much of it per step; None: nothing.

        Called once, with the model as it was given; may call `model` and `spend`.
        """
        return None

    def memory_embedding(self, batch: dict[str, Tensor]) -> PromptEmbedding:
        """Embeddings for the rows of `memory_records`; by default rows of the table."""
        return self.rows(batch["prompt"])

    # ---- data -----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Encode pictures and captions; the same on every process and after a resume.

        Lightning calls it before it loads a checkpoint, so that the model is still the given one.
        """
        if self.records:
            return
        self.model.to(self.trainer.strategy.root_device).eval()
        with torch.no_grad(), self._autocast():
            self._prepare_records()

    def _prepare_records(self) -> None:
        retain = self.memorized.retain
        texts = list(dict.fromkeys([*self.memorized.texts, *retain.prompts]))
        self.table = PromptEmbedding.cat([self.model.unconditional(), self.embedded(texts)])
        self.row_of = {text: row for row, text in enumerate(texts, 1)}
        if retain.images is None:
            settings = (1, self.model.steps, self.model.guidance, self.seed)
            made = made_pictures(self.model, retain.prompts, *settings)
            latents = made.latents
            self.charge(retain=made.passes)
        else:
            latents = self.encoded(retain.images)
        prompt = torch.tensor([self.row_of[text] for text in retain.prompts])
        order = torch.randperm(len(latents), generator=generator(self.seed, "repair-held-out"))
        split = max(1, min(64, len(order) // 8))
        held, kept = order[:split].sort().values, order[split:].sort().values
        if self.tolerance is None:
            kept = torch.arange(len(order))
        self.held_out = NoisedPictures(
            self.model, latents[held], prompt[held], self.seed, "repair-held-out-noise"
        )
        retained = NoisedPictures(
            self.model,
            latents[kept],
            prompt[kept],
            self.seed,
            "repair-retain",
            self.caption_dropout,
        )
        self.sizes, self.records = {"retain": self.retain_batch_size}, {"retain": retained}
        memory = self.memory_records()
        if memory is not None:
            self.records["memory"], self.sizes["memory"] = memory
        if self.tolerance is not None:
            self.errors.fill_(self.held_out_error())

    def charge(self, forget: int = 0, retain: int = 0) -> None:
        """Count forward passes of the preparation once, though every process makes them."""
        if self.global_rank == 0:
            self.spend(forget=forget, retain=retain)

    def embedded(self, texts: Sequence[str]) -> PromptEmbedding:
        """Embed texts a few at a time."""
        parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        return PromptEmbedding.cat([self.model.encode(part) for part in parts])

    def encoded(self, images: Tensor) -> Tensor:
        """Latents (N, C, h, w) of pictures (N, 3, H, W), in single precision on the CPU.

        Raises:
            DataError: pictures of another size than the model's.
        """
        device = next(self.model.network.parameters()).device
        parts = [self.model.to_latents(part.to(device)) for part in images.split(AT_ONCE)]
        latents = torch.cat([part.float().cpu() for part in parts])
        if tuple(latents.shape[1:]) != self.model.latent_shape:
            raise DataError(
                f"pictures {tuple(images.shape[1:])} become latents {tuple(latents.shape[1:])} "
                f"instead of {self.model.latent_shape}; resize them to the model's size"
            )
        return latents

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of all records; an epoch goes once through the ordinary ones."""
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(
            EndlessStream(self.records, self.sizes, self.seed, first), batch_size=None
        )

    # ---- training -------------------------------------------------------------------------------

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Squared errors on ordinary pictures and on the memorized prompts, in one pass."""
        return self.regression({name: batch[name] for name in self.records})

    def regression(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean squared error of each part over the global batch, all parts in one pass.

        Args:
            parts: batches of `records`, by name.
        """
        embeddings = [
            self.memory_embedding(part) if name == "memory" else self.rows(part["prompt"])
            for name, part in parts.items()
        ]
        noisy, time, target = (
            torch.cat([part[key] for part in parts.values()]) for key in ("noisy", "time", "target")
        )
        found = self.predicted(noisy, time, PromptEmbedding.cat(embeddings))
        errors = (found - target).square().flatten(1).mean(1)
        sizes = [len(part["weight"]) for part in parts.values()]
        return {
            name: self.global_mean(error, part["weight"].to(error))
            for (name, part), error in zip(parts.items(), errors.split(sizes), strict=True)
        }

    def rows(self, prompt: Tensor) -> PromptEmbedding:
        """Rows of the table of embeddings."""
        found: PromptEmbedding = self.table[prompt.to(self.table.states.device)]
        return found

    def predicted(self, noisy: Tensor, time: Tensor, embedding: PromptEmbedding) -> Tensor:
        """Raw output of the denoiser, in the precision of `noisy`."""
        pooled = None if embedding.pooled is None else embedding.pooled.to(noisy)
        with self._autocast():
            found = self.model.predict(
                noisy, time, PromptEmbedding(embedding.states.to(noisy), pooled)
            )
        return found.to(noisy)  # type: ignore[no-any-return]

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Mean squared error on the held-out pictures, always on the same draws."""
        device, errors = next(self.model.network.parameters()).device, []
        total = HELD_OUT_DRAWS * len(self.held_out)
        for start in range(0, total, AT_ONCE):
            rows = range(start, min(start + AT_ONCE, total))
            batch = {key: value.to(device) for key, value in self.held_out[rows].items()}
            found = self.predicted(batch["noisy"], batch["time"], self.rows(batch["prompt"]))
            errors.append((found - batch["target"]).square().flatten(1).mean(1))
            self.charge(retain=len(batch["weight"]))
        return float(torch.cat(errors).mean())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the held-out error now and then, and end a run that damages the model."""
        ended = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if self.tolerance is None or not ended or self.global_step % self.check_every:
            return
        self.errors[1] = self.held_out_error()
        if self.errors[1] > (1 + self.tolerance) * self.errors[0]:
            logger.warning(
                "%s ends at step %d: the error on held-out pictures rose from %.4g to %.4g, more "
                "than `tolerance` %g allows; lower `lr`",
                type(self).__name__,
                self.global_step,
                float(self.errors[0]),
                float(self.errors[1]),
                self.tolerance,
            )
            self.stopped_at.fill_(self.global_step)
            self.trainer.should_stop = True

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the step."""
        rows = {name: int(batch[name]["weight"].sum()) for name in self.records}
        self.spend(rows.get("memory", 0), rows["retain"], backward=True)

    def statistics(self) -> dict[str, Any]:
        """What was read, what was trained, and the held-out error before and after."""
        start, end = (None if value != value else value for value in self.errors.tolist())
        return super().statistics() | {
            "trained_parameters": self.trained_parameters,
            "held_out_error": [start, end],
            "stopped_at": int(self.stopped_at) or None,
        }
