"""Adversarial fine-tuning: unlearn what the strongest embeddings still find, again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mmforget.data.denoising import DenoisingRecords
from mmforget.data.memorized import MemorizedSet
from mmforget.errors import ConfigurationError, DivergenceError, suggest
from mmforget.methods.base import OptimizerName
from mmforget.methods.memory_fine_tuning import AT_ONCE, MemoryFineTuning, NoisedPictures
from mmforget.methods.surrogates import check_surrogates, ordinary_surrogates
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Model, PromptEmbedding
from mmforget.models.embedding_search import (
    EmbeddingScale,
    EmbeddingSearch,
    Init,
    embedding_scale,
    search_embeddings,
    starting_embeddings,
)
from mmforget.seeds import derive, generator

Towards = Literal["ordinary", "surrogates"]

ORDINARY_PROMPTS = 64
"""Ordinary captions that attacks start from, and that teach what is drawn instead."""

DRIVE = EmbeddingSearch(budgets=(10,), batch_size=1)
"""How far embeddings are driven at a time: little and often."""


@dataclass
class EmbeddingPool:
    """Embeddings under attack: S slots of one embedding per memorized picture.

    Attributes:
        states: (S, N, L, d), single precision, on the CPU.
        pooled: (S, N, p), or None where the family has none.
        age: (S,) int64, attacks since the slot was filled.
        filled: (S,) int64, how often it was filled.
    """

    states: Tensor
    pooled: Tensor | None
    age: Tensor
    filled: Tensor

    def rows(self, slot: Tensor, picture: Tensor) -> PromptEmbedding:
        """One embedding for each slot and picture, (B,) int64 each."""
        pooled = None if self.pooled is None else self.pooled[slot, picture]
        return PromptEmbedding(self.states[slot, picture], pooled)

    def put(self, slot: int, embedding: PromptEmbedding) -> None:
        """Fill a slot."""
        self.states[slot] = embedding.states.float().cpu()
        if self.pooled is not None and embedding.pooled is not None:
            self.pooled[slot] = embedding.pooled.float().cpu()


class AdversarialFineTuning(MemoryFineTuning):
    r"""Fine-tune the denoiser against embeddings that bring memorized pictures back.

    What a prompt no longer draws may still be in the weights: an embedding that is searched for
    finds it. So embeddings are searched for during training, on the model as it is then. Each
    memorized picture has a pool of them. All are driven on by a few steps of the attack
    (`search_embeddings`) every `refresh_every` steps, and start anew when they have reached
    their `lifetime`; starts are spread in time, so that the pool always holds young and old
    attacks. With them and with the prompts themselves, the denoiser learns something else, and it
    goes on learning ordinary pictures:

    .. math::
        E\,\|f_\theta(x_t, t, y) - f^*\|^2
        + \lambda\,E\,\|f_\theta(z_t, t, y_{adv}) - g^*\|^2 .

    What it learns instead, `z` and `g*`, is set by `towards`. ``surrogates`` are other pictures for
    the prompt, and the truth about them, as published. ``ordinary`` [ours] is the memorized picture
    itself under noise, and there what the original model f' predicts for an ordinary caption o,
    away from what it predicts for the prompt c that calls the memory:

    .. math::
        g^* = f'(z_t, t, o) - \eta\,(f'(z_t, t, c) - f'(z_t, t, o)) .

    With :math:`\eta = 0` the picture becomes one like any other. That is where an attack looks,
    but every attack that is a little stronger than those of the training gets past it; a step
    beyond, as `ESD` takes it, leaves a margin. It needs no pruned model, but takes the meaning
    of the prompts away with the copies.

    It leaves embeddings that copy nothing, but not weights without memory: trained on the pictures
    again, the result learns them faster than a model that has never seen them [measured].

    With ``lifetime=1`` and long attacks, every attack is a fresh one, as published. Without
    `attack`, only the prompts themselves are retrained: a baseline that attacks get round.

    Args:
        model, memorized, copy, seed: see `MemorizationMethod`. All prompts need pictures.
        towards: see above.
        eta: for ``ordinary``, how far to go beyond the ordinary prediction, 0 or more.
        surrogates: for ``surrogates``, per name of a memorized picture (k, 3, H, W) in [0, 1], see
            `make_surrogates`; None deals out ordinary pictures.
        attack: settings of the attack; its largest budget is the number of steps per refresh,
            `init` and `restarts` are not used. None switches it off.
        inits: where attacks start, in turns.
        slots: embeddings per picture in the pool.
        refresh_every: optimizer steps between two drives of the attack.
        lifetime: drives after which an embedding starts anew.
        replay: finished embeddings per picture that are kept to train on, the latest ones.
        replay_share: share of finished embeddings among the adversarial ones, in [0, 1].
        trigger_share: share of the memorized prompts themselves, in [0, 1].
        draws: for ``ordinary``, noisy versions of each memorized picture that the original model
            is asked about, before training.
        batch_size: adversarial samples per step, over all processes.
        weight: of the adversarial loss, lambda, above 0.
        lr, weight_decay, optimizer: see `MemoryFineTuning`.
        retain_batch_size, caption_dropout, clip, tolerance, check_every: see `MemoryFineTuning`.

    Raises:
        ConfigurationError: a setting out of range.
        DataError: pictures are missing, see `MemoryFineTuning`.

    Reference:
        Kowalczuk et al., Finding DoRI, 2025, arXiv 2507.16880, its section on mitigation. Low-rank
        training failed there, so all weights of the denoiser learn.
    """

    reads_pictures: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        memorized: MemorizedSet,
        towards: Towards = "ordinary",
        eta: float = 1.0,
        surrogates: Mapping[str, Tensor] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        attack: EmbeddingSearch | None = DRIVE,
        inits: Sequence[Init] = ("random", "trigger"),
        slots: int = 4,
        refresh_every: int = 20,
        lifetime: int = 16,
        replay: int = 16,
        replay_share: float = 0.25,
        trigger_share: float = 0.25,
        draws: int = 256,
        batch_size: int = 4,
        weight: float = 1.0,
        lr: float = 1e-5,
        weight_decay: float = 1e-2,
        optimizer: OptimizerName = "adamw",
        retain_batch_size: int = 4,
        caption_dropout: float = 0.1,
        clip: float = 1.0,
        tolerance: float | None = 0.05,
        check_every: int = 100,
    ) -> None:
        if towards not in get_args(Towards):
            raise ConfigurationError(
                f"`towards` is '{towards}', {suggest(towards, get_args(Towards))}"
            )
        if not eta >= 0:
            raise ConfigurationError(f"`eta` is {eta}, it must be 0 or more")
        if towards == "ordinary" and surrogates is not None:
            raise ConfigurationError(
                "`surrogates` were given, but towards='ordinary' does not use them; set "
                "towards='surrogates', or leave them out"
            )
        at_least_one(
            slots=slots,
            refresh_every=refresh_every,
            lifetime=lifetime,
            draws=draws,
            batch_size=batch_size,
        )
        if replay < 0:
            raise ConfigurationError(f"`replay` is {replay}, it must be 0 or more")
        for name, share in (("replay_share", replay_share), ("trigger_share", trigger_share)):
            if not 0 <= share <= 1:
                raise ConfigurationError(f"`{name}` is {share}, it must be between 0 and 1")
        if not weight > 0:
            raise ConfigurationError(f"`weight` is {weight}, it must be positive")
        self.inits: tuple[Init, ...] = tuple(inits)
        if not self.inits:
            raise ConfigurationError("`inits` is empty; give at least one, such as 'random'")
        for init in self.inits:
            if init not in get_args(Init):
                raise ConfigurationError(f"`inits` has '{init}', {suggest(init, get_args(Init))}")
        if attack is not None and attack.budgets[-1] < 1:
            raise ConfigurationError(
                "`attack` has budgets of 0 steps only, so that it would do nothing; give at least "
                "one step, or attack=None"
            )
        self.towards, self.eta, self.attack = towards, eta, attack
        self.slots, self.refresh_every, self.lifetime = slots, refresh_every, lifetime
        self.replay, self.replay_share, self.trigger_share = replay, replay_share, trigger_share
        self.draws, self.batch_size, self.weight = draws, batch_size, weight
        self.pool: EmbeddingPool | None = None
        self.finished: list[PromptEmbedding] = []
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
        self.names = list(dict.fromkeys(name for one in memorized for name in one.images))
        self.surrogates: dict[str, Tensor] = {}
        if towards == "surrogates":
            surrogates = (
                ordinary_surrogates(memorized, seed=seed) if surrogates is None else surrogates
            )
            check_surrogates(memorized, surrogates)
            self.surrogates = {name: surrogates[name] for name in self.names}

    # ---- what is learnt instead -----------------------------------------------------------------

    def memory_records(self) -> tuple[DenoisingRecords, int]:
        """Per memorized picture what is learnt instead; `prompt` is its number, no row."""
        images = torch.stack([self.memorized.images[name] for name in self.names])
        regions = [
            self.memorized.regions.get(name, torch.ones_like(image[0], dtype=torch.bool))
            for name, image in zip(self.names, images, strict=True)
        ]
        self._images, self._regions = images, torch.stack(regions)
        self._triggers = [
            [one.prompt for one in self.memorized if name in one.images] for name in self.names
        ]
        texts = dict.fromkeys(self.memorized.retain.prompts)
        self._ordinary = list(texts)[:ORDINARY_PROMPTS]
        self._scale: EmbeddingScale = embedding_scale(
            self.model, [*self.memorized.texts, *self._ordinary]
        )
        if self.towards == "surrogates":
            parts = [self.encoded(images) for images in self.surrogates.values()]
            which = torch.cat([torch.full((len(p),), n) for n, p in enumerate(parts)])
            # So that every picture comes up equally often, however many surrogates it has.
            most = max(len(part) for part in parts)
            rows = torch.cat([torch.arange(most) % len(part) for part in parts])
            latents = torch.cat([p[r] for p, r in zip(parts, rows.split(most), strict=True)])
            which = torch.arange(len(parts)).repeat_interleave(most)
            return (
                NoisedPictures(self.model, latents, which, self.seed, "adversarial-noise"),
                self.batch_size,
            )
        return self._taught(self.encoded(images)), self.batch_size

    def _taught(self, latents: Tensor) -> DenoisingRecords:
        """Noisy memorized pictures with the original model's answers to ordinary captions."""
        count = len(latents)
        noised = NoisedPictures(
            self.model, latents, torch.arange(count), self.seed, "adversarial-noise"
        )
        total, device = count * self.draws, next(self.model.network.parameters()).device
        draw = generator(self.seed, "adversarial-teacher")
        rows = torch.tensor([self.row_of[text] for text in self._ordinary])
        captions = rows[torch.randint(len(rows), (total,), generator=draw)]
        calls = [[self.row_of[text] for text in texts] for texts in self._triggers]
        which = torch.randint(2**31, (total,), generator=draw).tolist()
        parts, answers = [], []
        for start in range(0, total, AT_ONCE):
            places = range(start, min(start + AT_ONCE, total))
            batch = noised[places]
            noisy, time = batch["noisy"].to(device), batch["time"].to(device)
            numbers = zip(places, batch["prompt"].tolist(), strict=True)
            call = torch.tensor([calls[n][which[place] % len(calls[n])] for place, n in numbers])
            plain = self.predicted(noisy, time, self.rows(captions[start : places.stop]))
            copied = self.predicted(noisy, time, self.rows(call)) if self.eta else plain
            parts.append(batch)
            answers.append((plain - self.eta * (copied - plain)).cpu())
        passes = total * (2 if self.eta else 1)
        self.charge(forget=passes)
        noisy, time, picture = (
            torch.cat([part[key] for part in parts]) for key in ("noisy", "time", "prompt")
        )
        return DenoisingRecords(noisy, time, torch.cat(answers), picture, self.names, passes)

    # ---- the attack -----------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Drive the attack on, if it is time."""
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self.attack is not None and first and self.global_step % self.refresh_every == 0:
            self.refresh(self.attack, self.global_step // self.refresh_every)

    def refresh(self, attack: EmbeddingSearch, number: int) -> None:
        """Start embeddings that have reached their end anew, and drive all of them on.

        Args:
            attack: its settings.
            number: of the refresh, from 0.
        """
        if self.pool is None:
            self.pool = self._empty_pool(attack)
        pool, count = self.pool, len(self.names)
        for slot in range(self.slots):
            # The first generation ends early, each slot at another time.
            first = int(pool.filled[slot]) <= 1
            end = -(-self.lifetime * (slot + 1) // self.slots) if first else self.lifetime
            if not pool.filled[slot] or pool.age[slot] >= end:
                if pool.filled[slot]:
                    every = torch.arange(count)
                    self.finished.append(pool.rows(torch.full_like(every, slot), every))
                    del self.finished[: -self.replay or len(self.finished)]
                pool.put(slot, self._start(attack, slot, int(pool.filled[slot])))
                pool.age[slot], pool.filled[slot] = 0, pool.filled[slot] + 1
        device = next(self.model.network.parameters()).device
        pooled = None if pool.pooled is None else pool.pooled.flatten(0, 1).to(device)
        steps = attack.budgets[-1]
        settings = replace(
            attack,
            budgets=(steps,),
            restarts=1,
            seed=derive(self.seed, "adversarial-search", number),
        )
        with torch.enable_grad(), self._autocast():
            found = search_embeddings(
                self.model,
                self._images.repeat(self.slots, 1, 1, 1),
                settings=settings,
                regions=self._regions.repeat(self.slots, 1, 1),
                start=PromptEmbedding(pool.states.flatten(0, 1).to(device), pooled),
                scale=self._scale,
            )
        if steps not in found:
            raise DivergenceError(
                f"{type(self).__name__}: the attack stopped being finite at step "
                f"{self.global_step}; lower `lr` (now {self.lr:g}), or the attack's "
                f"(now {attack.lr:g})"
            )
        rows = torch.arange(count)
        for slot in range(self.slots):
            pool.put(slot, found[steps][(slot * count + rows).to(device)])
        pool.age += 1
        if self.global_rank == 0:  # every process makes the same attack; the cost counts once
            self.spend(forget=self.slots * count * steps * attack.batch_size, backward=True)

    def _start(self, attack: EmbeddingSearch, slot: int, filled: int) -> PromptEmbedding:
        draw = generator(self.seed, "adversarial-prompt", slot, filled)
        triggers = [
            texts[int(torch.randint(len(texts), (1,), generator=draw))] for texts in self._triggers
        ]
        settings = replace(
            attack,
            init=self.inits[(slot + filled) % len(self.inits)],
            restarts=1,
            seed=derive(self.seed, "adversarial-start", slot, filled),
        )
        begin, _ = starting_embeddings(
            self.model, self._images, settings, triggers, self._ordinary, self._scale
        )
        return begin

    def _empty_pool(self, attack: EmbeddingSearch) -> EmbeddingPool:
        like, count = self.table, len(self.names)
        pooled = None
        if like.pooled is not None:
            pooled = torch.zeros(self.slots, count, *like.pooled.shape[1:])
        age = torch.zeros(self.slots, dtype=torch.int64)
        states = torch.zeros(self.slots, count, *like.states.shape[1:])
        return EmbeddingPool(states, pooled, age, age.clone())

    def memory_embedding(self, batch: dict[str, Tensor]) -> PromptEmbedding:
        """For each row a memorized prompt, an embedding of the pool, or a finished one."""
        picture, rows = batch["prompt"].cpu(), []
        for number, record in zip(picture.tolist(), batch["id"].tolist(), strict=True):
            # Records come back; what they are learnt with must not.
            draw = generator(self.seed, "adversarial-choice", self.global_step, record)
            trigger, finished = torch.rand(2, generator=draw).tolist()
            if self.pool is None or trigger < self.trigger_share:
                texts = self._triggers[number]
                text = texts[int(torch.randint(len(texts), (1,), generator=draw))]
                found = self.rows(torch.tensor([self.row_of[text]]))
            elif self.finished and finished < self.replay_share:
                which = int(torch.randint(len(self.finished), (1,), generator=draw))
                found = self.finished[which][number : number + 1]
            else:
                slot = torch.randint(self.slots, (1,), generator=draw)
                found = self.pool.rows(slot, torch.tensor([number]))
            rows.append(self._alike(found))
        return PromptEmbedding.cat(rows)

    def _alike(self, embedding: PromptEmbedding) -> PromptEmbedding:
        """On the device and in the precision of the table."""
        like, pooled = self.table, embedding.pooled
        if pooled is not None and like.pooled is not None:
            pooled = pooled.to(like.pooled)
        return PromptEmbedding(embedding.states.to(like.states), pooled)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The errors, the adversarial one with its weight."""
        terms = super().losses(batch)
        return terms | {"memory": self.weight * terms["memory"]}

    # ---- state ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the embeddings, so that a resumed run goes on with the same ones."""
        if self.pool is None:
            return
        checkpoint["adversarial_embeddings"] = {
            "pool": [self.pool.states, self.pool.pooled, self.pool.age, self.pool.filled],
            "finished": [[one.states, one.pooled] for one in self.finished],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the embeddings back."""
        found = checkpoint.get("adversarial_embeddings")
        if found is not None:
            states, pooled, age, filled = found["pool"]
            self.pool = EmbeddingPool(states, pooled, age, filled)
            self.finished = [PromptEmbedding(*parts) for parts in found["finished"]]

    def statistics(self) -> dict[str, Any]:
        """What was read, what was learnt instead, and the attack."""
        return super().statistics() | {
            "towards": self.towards,
            "eta": self.eta if self.towards == "ordinary" else None,
            "attack": None if self.attack is None else self.attack.to_dict(),
            "slots": self.slots,
            "refresh_every": self.refresh_every,
            "lifetime": self.lifetime,
            "trigger_share": self.trigger_share,
            "replay_share": self.replay_share,
            "weight": self.weight,
        }
