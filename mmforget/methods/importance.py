"""How much each single weight matters for a set of samples, from exact per-sample gradients.

The value of one sample is squared or made absolute *before* it is added to the others, so a batched
backward is not enough: it would give the square of a sum, which depends on the batch size and on
the order of the samples. Per-sample gradients come from one batched forward and backward:

* layers of known form (linear, convolution, LayerNorm, BatchNorm in eval mode) from their recorded
  inputs and output gradients, summed over positions before anything is squared; so do RMSNorm and
  embeddings;
* parameters that broadcast over the batch (class token, position embedding) by giving every sample
  its own copy;
* everything else by `torch.func.vmap`, or by one backward per sample where that is unsupported.

Nothing of this is trusted: on the first samples each parameter is compared with an ordinary
backward of a single sample, and one that differs (a layer that mixes the batch axis, a weight used
in two ways) goes to the last group.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.base import stacked
from mmforget.models.base import Batch, HasLogits, HasLoss, Model, check_capabilities

logger = logging.getLogger(__name__)

ImportanceKind = Literal["empirical_fisher", "abs_l2_output"]
Call = tuple[nn.Module, Tensor, Tensor]  # layer, its input, the gradient of its output

Likeness = tuple[tuple[tuple[int, ...], ...], ...]
"""What samples must have in common so that their pictures are a batch: number and shapes."""

MAX_CHUNK = 64
CHUNK_BYTES = 2**28
PROBES = 3
MEMBERSHIP = "_membership"


def alike(batch: Batch) -> dict[Likeness, Tensor]:
    """Rows of a batch, by the number and the shapes of their pictures.

    Samples without lists of pictures are all alike.
    """
    size = len(batch["weight"])
    columns = [v for v in batch.values() if isinstance(v, list) and isinstance(v[0], list)]
    groups: dict[Likeness, list[int]] = {}
    for row in range(size):
        likeness = tuple(tuple(tuple(one.shape) for one in column[row]) for column in columns)
        groups.setdefault(likeness, []).append(row)
    return {likeness: torch.tensor(rows) for likeness, rows in groups.items()}


def rows_of(batch: Batch, rows: Tensor) -> dict[str, Any]:
    """Some rows of a batch, of its tensors as of its lists."""
    chosen = rows.tolist()
    return {
        key: value[rows.to(value.device)]
        if isinstance(value, Tensor)
        else [value[row] for row in chosen]
        for key, value in batch.items()
    }


class PerSampleImportance:
    """Sums of per-sample importance over groups of samples, one value per trainable parameter.

    With ``g_i`` the gradient of sample ``i`` at the given weights in eval mode:

    * ``empirical_fisher``: the sum of ``g_i ** 2``, where ``g_i`` is the gradient of the model's
      loss for the true label;
    * ``abs_l2_output``: the sum of ``|g_i|``, where ``g_i`` is the gradient of the squared
      Euclidean norm of the logits. Needs no labels.

    The sums don't depend on the batch size, to the bit: samples wait until a chunk is full, so the
    passes are the same for any batch size. They depend on the order of the samples only by the
    rounding of float32 sums within a chunk (about 1e-7); chunks are added up in float64.

    Args:
        model: the model; its frozen parameters are left out, tied ones are counted once.
        kind: which importance, see above.
        chunk: samples in one pass; None takes as many as keep the largest single-layer buffer below
            256 MiB, at most 64.

    Raises:
        CapabilityError: the model has no loss or no logits.
        ConfigurationError: the kind is unknown, or nothing in the model can be trained.

    Reference:
        The two kinds: J. Foster et al., *Fast Machine Unlearning Without Retraining Through
        Selective Synaptic Dampening*, AAAI 2024 (arXiv 2308.07707), and *Loss-Free Machine
        Unlearning*, ICLR 2024 Tiny Papers (arXiv 2402.19308). Both repositories square or take
        absolute values of gradients that are averaged over a batch, hence their results change
        with the loader.
    """

    def __init__(self, model: Model, kind: ImportanceKind, chunk: int | None = None) -> None:
        if kind not in get_args(ImportanceKind):
            kinds = get_args(ImportanceKind)
            raise ConfigurationError(f"`kind` is '{kind}', {suggest(kind, kinds)}")
        need = HasLoss if kind == "empirical_fisher" else HasLogits
        check_capabilities(f"importance '{kind}'", model, (need,))
        self.kind: ImportanceKind = kind
        self.shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        if not self.shapes:
            raise ConfigurationError("no parameter of the model is trainable; unfreeze some first")
        sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(sizes)
        self._starts = dict(zip(self.shapes, accumulate([0, *sizes]), strict=False))
        if chunk is not None and chunk < 1:
            raise ConfigurationError(f"`chunk` is {chunk}, it must be at least 1")
        self.chunk = chunk or max(1, min(MAX_CHUNK, CHUNK_BYTES // (4 * max(sizes))))
        self._objective = _Objective(model, kind)
        self._plans: dict[Likeness, _Plan] = {}
        self.reset()
        self._vmap_works = True

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a vector of length `size` into one view per parameter, shaped like it."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {n: part.view(s) for (n, s), part in zip(self.shapes.items(), parts, strict=True)}

    def reset(self) -> None:
        """Forget the samples that wait for their chunk to be full."""
        self._waiting: dict[Likeness, dict[str, Any]] = {}

    def add(self, batch: Batch, membership: Tensor, sums: Tensor) -> None:
        """Add the importance of one batch; a part of it may wait until `flush`.

        Args:
            batch: B samples.
            membership: (groups, B) weight with which each sample counts in each group; samples
                that count in none, such as padding, are left out.
            sums: (groups, `size`) accumulator, changed in place; float64 below 10 M parameters.

        Raises:
            ConfigurationError: a BatchNorm layer uses the statistics of the batch, so that there
                is no such thing as the gradient of a single sample.
        """
        _refuse_batch_statistics(self._objective.model)
        counted = membership.any(dim=0)
        whole = rows_of({**batch, MEMBERSHIP: membership.T}, counted.nonzero()[:, 0])
        for likeness, rows in alike(whole).items():
            part = rows_of(whole, rows)
            if likeness in self._waiting:
                part = stacked((self._waiting[likeness], part))
            while len(part[MEMBERSHIP]) >= self.chunk:
                self._add_chunk({k: v[: self.chunk] for k, v in part.items()}, sums)
                part = {k: v[self.chunk :] for k, v in part.items()}
            self._waiting[likeness] = part

    def flush(self, sums: Tensor) -> None:
        """Add what still waits, filled up with repeats of weight 0."""
        waiting = self._waiting
        self.reset()
        for _, group in sorted(waiting.items()):
            size = len(group[MEMBERSHIP])
            if size:
                part = rows_of(group, torch.arange(self.chunk).clamp(max=size - 1))
                part[MEMBERSHIP][size:] = 0
                self._add_chunk(part, sums)

    def _add_chunk(self, part: dict[str, Any], sums: Tensor) -> None:
        membership = part.pop(MEMBERSHIP).T
        for name, gradient in self.gradients(part):
            values = gradient.abs_() if self.kind == "abs_l2_output" else gradient.square_()
            values = values.reshape(self.chunk, -1)
            start = self._starts[name]
            sums[:, start : start + values.shape[1]] += membership.to(values.dtype) @ values

    def gradients(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, (B, *shape) per-sample gradients) of one batch, parameter by parameter.

        All its samples are `alike`. The receiver may overwrite the gradients.
        """
        likeness = next(iter(alike(batch)))
        if likeness not in self._plans:
            self._plans[likeness] = self._make_plan(batch)
        plan = self._plans[likeness]
        yield from self._batched(batch, plan.layers, plan.expanded)
        if plan.rest:
            yield from ((n, g.clone()) for n, g in self._remaining(batch, plan.rest))

    # ---- the plan ---------------------------------------------------------------------------

    def _make_plan(self, batch: Batch) -> _Plan:
        """Choose the fastest way that reproduces ordinary backward passes, per parameter."""
        count = min(PROBES, len(batch["weight"]))
        probe = {k: v[:count] for k, v in batch.items()}
        layers = self._known_layers()
        by_layer = {name for names in layers.values() for name in names.values()}
        expanded = [n for n, s in self.shapes.items() if n not in by_layer and s and s[0] == 1]
        truth = dict(self._by_loop(probe, list(self.shapes)))
        norms = [t.norm() for t in truth.values()]
        scale = 1e-6 * torch.stack(norms).norm() if norms else 0.0
        try:
            fast = dict(self._batched(probe, layers, expanded, trying=True))
        except RuntimeError as error:  # a network that doesn't broadcast its one-row parameters
            logger.info("per-sample copies of %s do not fit the network: %s", expanded, error)
            expanded = []
            fast = dict(self._batched(probe, layers, expanded, trying=True))
        # What no probe uses, such as a projector without pictures, stays with its layer.
        good = by_layer - truth.keys() - fast.keys()
        good |= {
            name
            for name, value in fast.items()
            if name in truth and (value - truth[name]).norm() <= 1e-3 * truth[name].norm() + scale
        }
        rest = [name for name in self.shapes if name not in good]
        if rest:
            logger.info("per-sample gradients by vmap for %s", ", ".join(rest))
        return _Plan(
            {m: {k: n for k, n in names.items() if n in good} for m, names in layers.items()},
            [name for name in expanded if name in good],
            rest,
        )

    def _known_layers(self) -> dict[nn.Module, dict[str, str]]:
        """Layers of known form with the qualified names of their own trainable parameters."""
        name_of = {id(p): n for n, p in self._objective.model.named_parameters()}
        layers: dict[nn.Module, dict[str, str]] = {}
        for module in self._objective.model.modules():
            if isinstance(module, nn.Conv2d):
                known = module.padding_mode == "zeros" and not isinstance(module.padding, str)
            elif isinstance(module, nn.Embedding):
                known = module.max_norm is None and not module.scale_grad_by_freq
            else:
                kinds = nn.Linear | nn.LayerNorm | nn.BatchNorm2d
                known = isinstance(module, kinds) or _is_rms_norm(module)
            if known:
                own = {k: name_of[id(p)] for k, p in module.named_parameters(recurse=False)}
                own = {k: n for k, n in own.items() if n in self.shapes}
                if own:
                    layers[module] = own
        return layers

    # ---- three ways to the same gradients -------------------------------------------------------

    def _batched(
        self,
        batch: Batch,
        layers: dict[nn.Module, dict[str, str]],
        expanded: list[str],
        trying: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """One forward and backward for the whole batch; no gradient of any weight is formed.

        With `trying`, layers whose input does not have the samples in front are left out.
        """
        size = len(batch["weight"])
        fixed = {n: p.detach() for n, p in self._objective.model.named_parameters()}
        copies = {
            n: fixed[n].expand(size, *self.shapes[n][1:]).clone().requires_grad_() for n in expanded
        }
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            # The first layers see no gradient, since the weights are constants here.
            output = output if output.requires_grad else output.detach().requires_grad_()
            seen.append((module, inputs[0].detach(), output))
            return output

        handles = [m.register_forward_hook(record) for m, names in layers.items() if names]
        try:
            with torch.enable_grad():
                total = self._objective.call(batch, fixed | copies).sum()
        finally:
            for handle in handles:
                handle.remove()
        leaves = [*copies.values(), *(output for _, _, output in seen)]
        if not leaves:
            return
        got = torch.autograd.grad(total, leaves, allow_unused=True)
        for name, gradient in zip(copies, got[: len(copies)], strict=True):
            if gradient is not None:
                # autograd may give one tensor to several leaves
                yield name, gradient.unsqueeze(1).clone()
        calls: dict[str, list[tuple[str, Call]]] = {}
        for (module, entered, _), gradient in zip(seen, got[len(copies) :], strict=True):
            if gradient is not None:
                for kind, name in layers[module].items():
                    calls.setdefault(name, []).append((kind, (module, entered, gradient)))
        seen.clear()
        del got, leaves, total
        for name in list(calls):  # a layer used twice, or a tied weight, adds up before the square
            try:
                parts = [_layer_gradient(kind, call, size) for kind, call in calls.pop(name)]
            except RuntimeError:
                if trying:
                    continue
                raise
            yield name, torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _remaining(self, batch: Batch, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """`vmap`, and one by one from the first time on that the network does not support it."""
        found: Iterable[tuple[str, Tensor]] | None = None
        if self._vmap_works and all(isinstance(value, Tensor) for value in batch.values()):
            try:
                found = self._by_vmap(batch, names).items()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # an operation without batching rule, or in place
                logger.warning("vmap is not supported by this network (%s); one by one", error)
                self._vmap_works = False
        yield from found or self._by_loop(batch, names)

    def _by_vmap(self, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        """`vmap` over single samples, for parameters that no shortcut reproduces."""
        fixed = {n: p.detach() for n, p in self._objective.model.named_parameters()}
        chosen = {n: fixed[n] for n in names}

        def value(parameters: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
            one = {k: v.unsqueeze(0) for k, v in sample.items()}
            return self._objective.call(one, fixed | parameters).squeeze(0)

        return torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(chosen, dict(batch))

    def _by_loop(self, batch: Batch, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """One backward per sample: slow, and right by definition; without what no sample uses."""
        fixed = {n: p.detach() for n, p in self._objective.model.named_parameters()}
        leaves = {n: fixed[n].clone().requires_grad_() for n in names}
        rows: dict[str, list[Tensor]] = {n: [] for n in names}
        used: set[str] = set()
        for i in range(len(batch["weight"])):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            with torch.enable_grad():
                value = self._objective.call(one, fixed | leaves).sum()
            got: Sequence[Tensor | None] = [None] * len(names)
            if value.requires_grad:
                got = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(names, got, strict=True):
                used |= set() if gradient is None else {name}
                rows[name].append(torch.zeros_like(leaves[name]) if gradient is None else gradient)
        yield from ((name, torch.stack(rows[name])) for name in names if name in used)


@dataclass(frozen=True)
class _Plan:
    """Which parameter is done which way."""

    layers: dict[nn.Module, dict[str, str]]
    expanded: list[str]
    rest: list[str]


class _Objective(nn.Module):
    """The scalar per sample whose gradient is taken, as a module for `functional_call`."""

    def __init__(self, model: Model, kind: ImportanceKind) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(self, batch: Batch) -> Tensor:
        if self.kind == "empirical_fisher":
            return cast(HasLoss, self.model).loss(batch)
        return cast(HasLogits, self.model).logits(batch).square().sum(-1)

    def call(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """Evaluate with other parameters, named as in the model."""
        swapped = {f"model.{name}": value for name, value in parameters.items()}
        return cast(Tensor, torch.func.functional_call(self, swapped, (batch,)))


def _layer_gradient(kind: str, call: Call, size: int) -> Tensor:
    """Per-sample gradient (B, *shape) of one parameter from a layer's input and output gradient."""
    layer, entered, gradient = call
    if isinstance(layer, nn.Linear):
        rows = gradient.reshape(size, -1, gradient.shape[-1])
        if kind == "bias":
            return rows.sum(1)
        return torch.bmm(rows.transpose(1, 2), entered.reshape(size, -1, entered.shape[-1]))
    if isinstance(layer, nn.Conv2d):
        if kind == "bias":
            return gradient.flatten(2).sum(2)
        patches = F.unfold(
            entered,
            cast(tuple[int, int], layer.kernel_size),
            cast(tuple[int, int], layer.dilation),
            cast(tuple[int, int], layer.padding),
            cast(tuple[int, int], layer.stride),
        ).unflatten(1, (layer.groups, -1))
        rows = gradient.flatten(2).unflatten(1, (layer.groups, -1))
        return torch.einsum("bgol,bgil->bgoi", rows, patches).reshape(size, *layer.weight.shape)
    if isinstance(layer, nn.BatchNorm2d):
        if kind == "weight":
            gradient = gradient * F.batch_norm(
                entered, layer.running_mean, layer.running_var, eps=layer.eps
            )
        return gradient.flatten(2).sum(2)
    if isinstance(layer, nn.Embedding):
        return _embedding_gradient(layer, entered, gradient, size)
    if _is_rms_norm(layer):
        if kind == "weight":
            shape = (entered.shape[-1],)
            gradient = gradient * F.rms_norm(entered.float(), shape, eps=_epsilon(layer))
        return gradient.reshape(size, -1, gradient.shape[-1]).sum(1)
    assert isinstance(layer, nn.LayerNorm)
    if entered.ndim == 4 and entered.shape[-1:] != layer.normalized_shape:
        # timm's LayerNorm2d normalises the channels of (B, C, H, W)
        entered, gradient = entered.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    if kind == "weight":
        gradient = gradient * F.layer_norm(entered, layer.normalized_shape, eps=layer.eps)
    return gradient.reshape(size, -1, *layer.normalized_shape).sum(1)


def _embedding_gradient(
    layer: nn.Embedding, entered: Tensor, gradient: Tensor, size: int
) -> Tensor:
    ids = entered.reshape(size, -1)
    rows = gradient.reshape(*ids.shape, -1)
    if layer.padding_idx is not None:
        rows = rows * (ids != layer.padding_idx).unsqueeze(-1)
    sample = torch.arange(size, device=ids.device).unsqueeze(1).expand_as(ids)
    found = rows.new_zeros(size, *layer.weight.shape)
    return found.index_put_((sample, ids), rows, accumulate=True)


def _is_rms_norm(layer: nn.Module) -> bool:
    """`nn.RMSNorm`, or one of the many that transformers defines, one per architecture."""
    return type(layer).__name__.endswith("RMSNorm")


def _epsilon(layer: Any) -> float | None:
    found = getattr(layer, "variance_epsilon", None)
    return getattr(layer, "eps", None) if found is None else found


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ConfigurationError(
                f"BatchNorm layer '{name}' uses the statistics of the batch, so single samples "
                "have no gradient of their own; call `model.eval()` and keep `track_running_stats`"
            )
