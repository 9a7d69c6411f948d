"""Attention heads that follow the picture, and those that follow what the model says without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import unwrapped
from mmforget.seeds import generator

HeadMode = Literal["zero", "mean"]
EffectKind = Literal["direct", "path"]


class Head(NamedTuple):
    """One query head of one decoder layer, both counted from 0."""

    layer: int
    head: int


@dataclass(frozen=True)
class HeadEffects:
    """What the heads do to the choice between the answer with and the answer without the picture.

    Attributes:
        effects: (T, H) mean over the samples; positive heads push what the picture shows.
        means: (T, H, d) mean output of every head at the last token of the question, before the
            output projection; for the mode ``mean`` of `pruned_heads`.
        n: samples in which the two answers differ.
        kind: how the effects were measured.
    """

    effects: Tensor
    means: Tensor
    n: int
    kind: EffectKind

    def strongest(self, number: int, follow: Literal["picture", "prior"]) -> list[Head]:
        """Heads of the largest effects, those that push the picture or its opposite.

        Raises:
            ConfigurationError: more heads than there are.
        """
        flat = self.effects.flatten() * (1 if follow == "picture" else -1)
        if not 0 <= number <= len(flat):
            raise ConfigurationError(f"`number` is {number}, but there are {len(flat)} heads")
        order = flat.sort(descending=True, stable=True).indices[:number].tolist()
        return [Head(*divmod(place, self.effects.shape[1])) for place in order]


def random_heads(like: Sequence[Head], heads: int, seed: int) -> list[Head]:
    """As many random heads in the same layers, a control.

    Args:
        like: heads that are imitated.
        heads: number of heads in a layer.
        seed: of the draw.
    """
    draw = generator(seed, "random_heads")
    layers = [one.layer for one in like]
    found = []
    for layer in sorted(set(layers)):
        order = torch.randperm(heads, generator=draw)[: layers.count(layer)]
        found += [Head(layer, head) for head in sorted(order.tolist())]
    return found


class _Seen(NamedTuple):
    """One forward pass at the last token: outputs of heads (B, T, H, d), what enters the norm."""

    heads: Tensor
    final: Tensor
    logits: Tensor


@torch.no_grad()
def head_effects(
    model: MultimodalLM,
    images: Sequence[Sequence[Tensor]],
    questions: Sequence[str],
    answers: Sequence[str],
    kind: EffectKind = "direct",
    batch_size: int = 64,
) -> HeadEffects:
    r"""Measure the effect of every head on the first token of the answer.

    With a the first token of the true answer and p the one that the model says without the picture,
    u their rows of the head, g the gain and :math:`\sigma` the root mean square of the final norm,

    * ``direct``: :math:`e_{l,h} = (z_{l,h} W_O^{l,h}) \cdot g (u_a - u_p) / \sigma`, all taken at
      the last token of the question, with :math:`\sigma` frozen;
    * ``path``: the change of the difference of the two logits when the output of the head is
      replaced by that without the picture, on its direct path only: nothing but the final norm and
      the head is computed again.

    Samples in which a = p say nothing, and are left out. Published for text models, where *memory*
    competes with the text given; here the picture is what is given. Heads may play both roles at
    once (Li et al., 2025, arXiv 2503.10996), so compare with `random_heads`.

    Args:
        model: the model.
        images: per question its pictures, uint8 (3, H, W).
        questions: texts.
        answers: true answers.
        kind: see above.
        batch_size: of the questions that are read together.

    Raises:
        DataError: there is no sample in which the answers differ.
        ConfigurationError: an unknown kind.

    Reference:
        Jin et al., Cutting off the head ends the conflict: A mechanism for interpreting and
        mitigating knowledge conflicts in language models (PH3), ACL 2024, arXiv 2402.18154. The
        carry-over to pictures and the effect ``direct`` are ours.
    """
    if kind not in get_args(EffectKind):
        raise ConfigurationError(f"`kind` is '{kind}', {suggest(kind, get_args(EffectKind))}")
    tokenizer = model.processor.tokenizer
    training = model.network.training
    model.network.eval()
    total = means = None
    number = rows = 0
    try:
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            asked = {"images": images[part], "question": questions[part]}
            shown = _seen(model, asked)
            bare = _seen(model, asked | {"images": [[] for _ in questions[part]]})
            firsts = [
                tokenizer(one, add_special_tokens=False)["input_ids"][0] for one in answers[part]
            ]
            true = torch.tensor(firsts, device=shown.logits.device)
            prior = bare.logits.argmax(dim=-1)
            apart = true != prior
            found = _effects(model, shown, bare, true, prior, kind)[apart].sum(dim=0).cpu()
            own = shown.heads.sum(dim=0).cpu()
            total = found if total is None else total + found
            means = own if means is None else means + own
            number, rows = number + int(apart.sum()), rows + len(true)
    finally:
        model.network.train(training)
    if total is None or means is None or not number:
        raise DataError(
            "the model says the true answer without the picture in all samples, so that no head "
            "can be told apart; give other questions"
        )
    return HeadEffects(total / number, means / rows, number, kind)


def _seen(model: MultimodalLM, batch: Mapping[str, Any]) -> _Seen:
    network: Any = unwrapped(model.network)
    layers: Any = model.family.layers(network)
    language = model.family.language_model(network)
    heads: list[Tensor] = []
    final: list[Tensor] = []

    def keep(layer: Any) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            heads.append(args[0][:, -1].unflatten(-1, (-1, layer.self_attn.head_dim)))

        return hook

    handles = [one.self_attn.o_proj.register_forward_pre_hook(keep(one)) for one in layers]
    handles.append(
        language.norm.register_forward_pre_hook(lambda _module, args: final.append(args[0][:, -1]))
    )
    try:
        inputs = model.inputs(batch, padding="left", answers=False)
        model.family.check_images(network, inputs)
        output = model.network(
            **model.family.model_inputs(inputs), logits_to_keep=1, use_cache=False
        )
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(torch.stack(heads, dim=1).float(), final[-1].float(), output.logits[:, -1].float())


def _effects(
    model: MultimodalLM, shown: _Seen, bare: _Seen, true: Tensor, prior: Tensor, kind: EffectKind
) -> Tensor:
    """(B, T, H)."""
    network: Any = unwrapped(model.network)
    norm = model.family.language_model(network).norm
    layers: Any = model.family.layers(network)
    rows = model.head.weight.float()
    towards = (rows[true] - rows[prior]) * norm.weight.float()
    outputs = shown.heads if kind == "direct" else bare.heads - shown.heads
    parts = []
    for number, layer in enumerate(layers):
        weight = layer.self_attn.o_proj.weight.float()
        split = weight.unflatten(1, outputs.shape[2:])  # D, H, d
        parts.append(torch.einsum("bhd,whd->bhw", outputs[:, number], split))
    change = torch.stack(parts, dim=1)  # B, T, H, D
    if kind == "direct":
        return torch.einsum("bthw,bw->bth", change, towards) / _scale(norm, shown.final)[:, None]
    patched = shown.final[:, None, None] + change
    before = torch.einsum("bw,bw->b", shown.final, towards) / _scale(norm, shown.final)[:, 0]
    after = torch.einsum("bthw,bw->bth", patched, towards) / _scale(norm, patched)[..., 0]
    return before[:, None, None] - after


def _scale(norm: Any, states: Tensor) -> Tensor:
    """(..., 1) what the final norm divides by."""
    return (states.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt()


@contextmanager
def pruned_heads(
    model: MultimodalLM,
    heads: Sequence[Head],
    mode: HeadMode = "zero",
    means: Tensor | None = None,
) -> Iterator[None]:
    """Silence heads in everything that a model does while the context is open.

    Nothing is trained, and no weight is changed.

    Args:
        model: the model.
        heads: which.
        mode: ``zero``, or ``mean`` to put `means` in place of their outputs.
        means: (T, H, d); see `HeadEffects`.

    Raises:
        ConfigurationError: a head that the network does not have, an unknown mode, or no `means`.
    """
    if mode not in get_args(HeadMode):
        raise ConfigurationError(f"`mode` is '{mode}', {suggest(mode, get_args(HeadMode))}")
    if mode == "mean" and means is None:
        raise ConfigurationError(
            "`mode` is 'mean', but `means` is missing; see `HeadEffects.means`"
        )
    layers: Any = model.family.layers(unwrapped(model.network))
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        own = layers[layer] if 0 <= layer < len(layers) else None
        if own is None or not 0 <= head < _heads(own):
            raise ConfigurationError(
                f"there is no head {head} in layer {layer}; the network has {len(layers)} layers "
                f"of {_heads(layers[0])} heads, counted from 0"
            )
        chosen.setdefault(layer, []).append(head)

    def silence(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            outputs = args[0].unflatten(-1, (-1, layers[layer].self_attn.head_dim)).clone()
            where = chosen[layer]
            outputs[..., where, :] = (
                0.0 if means is None or mode == "zero" else means[layer, where].to(outputs)
            )
            return (outputs.flatten(-2), *args[1:])

        return hook

    handles = []
    try:
        for layer in chosen:
            projection = layers[layer].self_attn.o_proj
            handles.append(projection.register_forward_pre_hook(silence(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _heads(layer: Any) -> int:
    attention = layer.self_attn
    return int(attention.o_proj.in_features // attention.head_dim)
