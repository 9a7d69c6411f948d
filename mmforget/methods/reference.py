"""The original model as a reference while its copy is trained, without a second network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmforget.data.base import ForgetDataModule
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.low_rank import LowRankAdapters
from mmforget.models.base import Batch, Model
from mmforget.models.multimodal import AnswerLogits

ReferenceKind = Literal["auto", "copy", "adapter_off"]


class Reference(nn.Module):
    """Answers as the model did before it was trained; made before the first step.

    Args:
        model: the model that will be trained.
        adapters: its adapters, if it has any.
        kind: ``copy`` keeps a frozen copy of the trained weights, and of nothing else;
            ``adapter_off`` computes without the adapters, which needs no memory, but is the
            original only if nothing else is trained; ``auto`` takes that where it is.

    Raises:
        ConfigurationError: ``adapter_off`` without adapters, or where other weights are trained.
    """

    def __init__(self, model: Model, adapters: LowRankAdapters | None, kind: ReferenceKind) -> None:
        super().__init__()
        if kind not in get_args(ReferenceKind):
            raise ConfigurationError(
                f"`reference` is '{kind}', {suggest(kind, get_args(ReferenceKind))}"
            )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        others = [name for name in trained if ".lora_" not in name]
        if kind == "adapter_off" and (adapters is None or others):
            reason = f"'{others[0]}' is trained too" if adapters else "`rank` is None"
            raise ConfigurationError(
                f"`reference` is 'adapter_off', but {reason}, so that the model without adapters "
                "is not the original; use 'copy'"
            )
        self._adapters = adapters if kind != "copy" and not others else None
        self._names = [] if self._adapters else list(trained)
        for number, name in enumerate(self._names):
            # Not in checkpoints: whoever resumes makes the method from the original again.
            self.register_buffer(
                f"weight_{number}", trained[name].detach().clone(), persistent=False
            )

    @torch.no_grad()
    def answer_logits(self, model: Model, batch: Batch) -> AnswerLogits:
        """What the original says at the answers of a batch, in eval mode and without gradient."""
        asked = _Asked(model)
        with _evaluating(model):
            if self._adapters is not None:
                with self._adapters.off():
                    return asked(batch)
            old = {f"model.{name}": self.get_buffer(f"weight_{i}") for i, name in
                   enumerate(self._names)}  # fmt: skip
            found: AnswerLogits = torch.func.functional_call(asked, old, (batch,))
            return found


class _Asked(nn.Module):
    """`answer_logits` as a module, for `functional_call`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> AnswerLogits:
        found: AnswerLogits = self.model.answer_logits(batch)
        return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class KnownLosses(nn.Module):
    """One number per sample, computed once and looked up by sample id.

    Args:
        ids: (N,) of the samples.
    """

    ids: Tensor
    totals: Tensor

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids.sort().values)
        # NaN: not computed yet. A buffer, so that a resumed run has it.
        self.register_buffer("totals", torch.full((len(ids),), torch.nan, dtype=torch.float64))

    @property
    def complete(self) -> bool:
        """Whether every sample has its number."""
        return not bool(self.totals.isnan().any())

    def fill(self, ids: Tensor, values: Tensor) -> None:
        """Store numbers (B,) of samples (B,)."""
        self.totals[torch.searchsorted(self.ids, ids)] = values.double()

    def gather(self) -> None:
        """Add what the other processes have computed, each for other samples."""
        self.totals.copy_(self.totals.nan_to_num(0.0))
        torch.distributed.all_reduce(self.totals)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The numbers (B,) of samples (B,)."""
        return self.totals[torch.searchsorted(self.ids, ids)]


def refuse_changing_pictures(data: ForgetDataModule) -> None:
    """Refuse data that shows other pictures each time, for which nothing can be kept.

    Raises:
        ConfigurationError: names the remedy.
    """
    if data.augment:
        raise ConfigurationError(
            "`reference` is 'cache', but `augment` of the data changes the pictures at every "
            "look; use 'copy', or set `augment` to False"
        )
