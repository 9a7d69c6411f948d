"""RegLoRA: tune on task after task, and hold the entries that earlier tasks have changed most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, ModelError, WeightsError, suggest
from mmforget.methods.low_rank import LowRankAdapters
from mmforget.models.base import Site, SiteKind, Sites, check_capabilities
from mmforget.retention.protected_entries import (
    CHUNK,
    Change,
    Difference,
    ProtectedEntries,
    check_share,
    lora_changes,
)
from mmforget.seeds import derive

logger = logging.getLogger(__name__)

FILE = "protected_entries.safetensors"


class RegLoRA:
    r"""Regularise the changes of weight matrices at entries that earlier tasks have changed most.

    Every task trains a fresh LoRA ``dW = B A`` on the given layers, which is merged at its end.
    Before that, the `share` entries of each ``dW`` that are largest in size join the protected set
    ``Omega`` of its matrix. While the next task is trained, this is added to its loss::

        weight * mean_W mean_{(i, j) in Omega_W} |(B A)_ij|

    over the matrices W that have protected entries. Only the entries in Omega are computed, by rows
    of B and columns of A, in chunks; the product itself is never formed. ::

        keep = RegLoRA(network, layers, rank=128)
        for task in tasks:
            keep.start_task()
            for batch in task:               # an optimizer over what requires gradients
                (loss(batch) + keep.regularisation()).backward()
                ...
            keep.finish_task()

    Differs from the released code: the divisor is the number of matrices, not 224; Omega is a set,
    where an entry that two tasks chose counted twice; B A is not formed. As there, it is not scaled
    by ``lora_alpha / rank``. Nothing holds what is trained besides the layers, see `also`.

    Args:
        network: edited in place.
        layers: names of its linear layers or convolutions (paper: all seven of every decoder
            layer).
        rank: of the adapters (paper: 128); None trains the matrices themselves, whose change is
            the difference to the end of the last task.
        lora_alpha: the scale of the adapters is ``lora_alpha / rank`` (paper: 256).
        share: of the entries of each matrix that a task protects (paper: 0.02).
        weight: of the term (paper: 2500).
        also: names of modules or parameters that are trained as well, without being held (paper:
            the projector). Everything else is frozen.
        protected: entries of earlier tasks.
        chunk: entries that are computed at once.
        seed: of the adapters' first weights.

    Raises:
        ConfigurationError: a setting out of range.
        ModelError: the network has no such layer, or one that is no matrix.
        WeightsError: `protected` belongs to another network.

    Reference:
        Chen et al., SEFE: Superficial and essential forgetting eliminator for multimodal continual
        instruction tuning, ICML 2025, arXiv 2505.02486.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        rank: int | None = 128,
        lora_alpha: float = 256.0,
        share: float = 0.02,
        weight: float = 2500.0,
        also: Sequence[str] = (),
        protected: ProtectedEntries | None = None,
        chunk: int = CHUNK,
        seed: int = 0,
    ) -> None:
        check_settings(rank, lora_alpha, share, weight)
        if isinstance(layers, str) or not layers:
            raise ConfigurationError(f"`layers` is {layers!r}; give the names of layers in a list")
        self.network = network
        self.layers = tuple(dict.fromkeys(layers))
        self.rank, self.lora_alpha = rank, lora_alpha
        self.share, self.weight, self.chunk = share, weight, chunk
        self.also, self.seed = tuple(also), seed
        self.protected = protected or ProtectedEntries()
        self.tasks = 0
        self._required: dict[str, bool] | None = None
        self._adapters: LowRankAdapters | None = None
        self._before: dict[str, Tensor] = {}
        names = [name for name, _ in network.named_modules()]
        for name in self.layers:
            if name not in names:
                raise ModelError(
                    f"{type(network).__name__} has no layer '{name}', {suggest(name, names)}"
                )
            if not isinstance(network.get_submodule(name), nn.Linear | nn.Conv2d):
                raise ModelError(
                    f"'{name}' is a {type(network.get_submodule(name)).__name__}; `layers` must be "
                    "linear layers or convolutions"
                )
        for name in self.also:
            if not any(one == name or one.startswith(name + ".") for one, _ in self._weights()):
                raise ModelError(f"`also` names '{name}', but the network has no weights there")
        self._check_protected()

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.network.named_parameters())

    def _matrix(self, name: str) -> Tensor:
        weight = cast(Tensor, self.network.get_submodule(name).weight)
        return weight.flatten(1)

    def _check_protected(self) -> None:
        for name, shape in self.protected.shapes.items():
            try:
                own = tuple(self._matrix(name).shape)
            except AttributeError:
                own = None
            if own != shape:
                raise WeightsError(
                    f"protected entries of '{name}' belong to a matrix of {shape}, but "
                    f"{type(self.network).__name__} has {own or 'no such layer'}; they were made "
                    "for another network"
                )

    @property
    def running(self) -> bool:
        """Whether a task has been started and not yet finished."""
        return self._required is not None

    def start_task(self) -> None:
        """Attach fresh adapters, which change nothing yet, and freeze the rest.

        Raises:
            ConfigurationError: the task before has not been finished.
        """
        if self.running:
            raise ConfigurationError("a task is running; call `finish_task` first")
        self._required = {name: weight.requires_grad for name, weight in self._weights()}
        self.network.requires_grad_(False)
        if self.rank is None:
            for name in self.layers:
                module = self.network.get_submodule(name)
                self._before[name] = self._matrix(name).detach().clone()
                cast(Tensor, module.weight).requires_grad_(True)
        else:
            sites = [Site(name, self.network.get_submodule(name), "") for name in self.layers]
            drawn = derive(self.seed, "reg_lora", self.tasks)
            self._adapters = LowRankAdapters(self.network, sites, self.rank, self.lora_alpha, drawn)
        for name, weight in self._weights():
            if any(name == one or name.startswith(one + ".") for one in self.also):
                weight.requires_grad_(True)

    def changes(self) -> dict[str, Change]:
        """What the running task has done to each layer so far.

        Raises:
            ConfigurationError: no task is running.
        """
        if not self.running:
            raise ConfigurationError("no task is running; call `start_task` first")
        if self.rank is None:
            return {
                name: Difference(self._matrix(name), self._before[name]) for name in self.layers
            }
        found = lora_changes(self.network)
        return {name: found[name] for name in self.layers}

    def regularisation(self) -> Tensor:
        """The term of the loss, a scalar; 0 in the first task."""
        return self.weight * self.protected.penalty(self.changes(), self.chunk)

    def add_gradients(self) -> float:
        """Add the gradient of `regularisation` to ``grad`` of the weights, and return its value.

        Needs the memory of one chunk only, and starts no hooks of distributed training: on all
        processes the term, and so its gradient, is the same.
        """
        changes = self.changes()
        weights = [weight for _, weight in self._weights() if weight.requires_grad]
        total = 0.0
        for part in self.protected.parts(changes, self.chunk):
            term = self.weight * part
            total += float(term.detach())
            found = torch.autograd.grad(term, weights, allow_unused=True)
            for weight, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    own = weight.grad
                    weight.grad = gradient if own is None else own.add_(gradient)
        return total

    def finish_task(self) -> None:
        """Protect what this task has changed most, and merge its adapters.

        Raises:
            ConfigurationError: no task is running.
        """
        self.protect()
        self.merge()

    def protect(self) -> None:
        """First half of `finish_task`."""
        self.protected.add(self.changes(), self.share)
        self.tasks += 1

    def merge(self) -> None:
        """Second half of `finish_task`."""
        self._detach(merge=True)

    def abandon(self) -> None:
        """End a task as if it had not been; what was trained besides the layers stays trained."""
        if not self.running:
            return
        with torch.no_grad():
            for name, before in self._before.items():
                self._matrix(name).copy_(before)
        self._detach(merge=False)

    def _detach(self, merge: bool) -> None:
        if self._adapters is not None:
            self._adapters.merge() if merge else self._adapters.unload()
            self._adapters = None
        self._before = {}
        required, self._required = self._required or {}, None
        for name, weight in self._weights():
            weight.requires_grad_(required.get(name, True))


def check_settings(rank: int | None, lora_alpha: float, share: float, weight: float) -> None:
    """Refuse settings of `RegLoRA` that have no meaning.

    Raises:
        ConfigurationError: names the setting and its value.
    """
    if rank is not None and rank < 1:
        raise ConfigurationError(f"`rank` is {rank}; it must be at least 1, or None")
    if not lora_alpha > 0:
        raise ConfigurationError(f"`lora_alpha` is {lora_alpha}; it must be positive")
    check_share(share)
    if not weight >= 0:
        raise ConfigurationError(f"`weight` is {weight}; it must not be negative")


class RegLoRACallback(Callback):
    """`RegLoRA` for one task of a Lightning trainer, such as that of ``mmforget fit``.

    Attaches the adapters before training, adds the gradient of the term before every step of the
    optimizer, and at the end writes the protected entries and merges: the model that comes out has
    its own weights again. The next task is given the file. ::

        Trainer(callbacks=[RegLoRACallback(rank=8, save="one.safetensors")]).fit(model, first)
        Trainer(callbacks=[RegLoRACallback(rank=8, protected="one.safetensors")]).fit(model, second)

    In a configuration of ``mmforget fit``::

        trainer:
          callbacks:
            - class_path: mmforget.retention.RegLoRACallback
              init_args: {rank: 8, protected: runs/one/protected_entries.safetensors}

    The term is logged as ``train/reg_lora``. It holds for any model that offers `Sites`.

    Args:
        rank: see `RegLoRA`, as the next arguments.
        lora_alpha: see there.
        share: see there.
        weight: see there.
        also: see there.
        seed: see there.
        kinds: which layers of the model are trained, by their function.
        protected: file of the task before; None for a first task.
        save: file for the next task; None takes ``protected_entries.safetensors`` in the trainer's
            ``default_root_dir``.

    Raises:
        ConfigurationError: a setting out of range.
        MissingFileError: there is no file `protected`.
        WeightsError: it is damaged; when training starts: it belongs to another network.
    """

    def __init__(
        self,
        rank: int | None = 128,
        lora_alpha: float = 256.0,
        share: float = 0.02,
        weight: float = 2500.0,
        also: Sequence[str] = (),
        kinds: Sequence[SiteKind] = ("attention", "ffn"),
        protected: str | Path | None = None,
        save: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        check_settings(rank, lora_alpha, share, weight)
        for kind in kinds:
            if kind not in get_args(SiteKind):
                raise ConfigurationError(
                    f"`kinds` names '{kind}', {suggest(kind, get_args(SiteKind))}"
                )
        if not kinds:
            raise ConfigurationError("`kinds` is empty; name one or more kinds of layers")
        self.rank, self.lora_alpha, self.share, self.weight = rank, lora_alpha, share, weight
        self.also, self.kinds, self.seed = tuple(also), tuple(kinds), seed
        self.entries = None if protected is None else ProtectedEntries.load(protected)
        self.save = save
        self.keeper: RegLoRA | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the adapters, before the optimizer is made.

        Raises:
            CapabilityError: the model does not offer `Sites`.
        """
        if stage != "fit":
            return
        check_capabilities("RegLoRA", pl_module, (Sites,))
        model = cast(Sites, pl_module)
        layers = [site.name for kind in self.kinds for site in model.sites(kind)]
        self.keeper = RegLoRA(
            model.network,
            layers,
            rank=self.rank,
            lora_alpha=self.lora_alpha,
            share=self.share,
            weight=self.weight,
            also=self.also,
            protected=self.entries,
            seed=self.seed,
        )
        self.keeper.start_task()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the term: once per step, after accumulation and unscaling."""
        if self.keeper is not None and len(self.keeper.protected):
            pl_module.log("train/reg_lora", self.keeper.add_gradients())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Protect what this task has changed most, and write it."""
        if self.keeper is None:
            return
        self.keeper.protect()
        self.entries = self.keeper.protected
        if trainer.is_global_zero:
            self.entries.save(Path(self.save or Path(trainer.default_root_dir) / FILE))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge: after the last checkpoint has been written."""
        if stage == "fit" and self.keeper is not None:
            self.keeper.merge()
            self.keeper = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the adapters off, so that the model is as it was."""
        if self.keeper is not None:
            self.keeper.abandon()
            self.keeper = None
