"""Cross-attention that leans on the begin token and never sees the padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError, ModelError
from mmforget.mitigation.base import Before, PromptMitigation
from mmforget.models.diffusion import DiffusionGenerator

MASKED = -10000.0
"""What diffusers adds to the logits of tokens that may not be attended to."""


@dataclass(frozen=True)
class AttentionReweighting(PromptMitigation):
    r"""Draw the attention of a memorized prompt away from the tokens that trigger it.

    In every cross-attention, for the rows that are conditioned on a prompt, the logit of the begin
    token is multiplied by a factor, and tokens after the end token, in which CLIP sums the prompt
    up once more, are masked. Since logits are linear in the keys, the key of the begin token is
    multiplied; that is the same for every implementation of attention.

    Only for Stable Diffusion 1, 2 and XL: where text and picture attend jointly, attention to the
    begin token is no attention to nothing, and T5 has none.

    Args:
        factor: of the logit of the begin token; 1 changes nothing. A logit below 0 gets smaller.
        mask_padding: whether tokens after the end token are masked.

    Raises:
        ConfigurationError: a factor not above 0.

    Reference:
        Ren, Li, Zeng, Xu, Lyu, Xing, Tang, "Unveiling and Mitigating Memorization in Text-to-image
        Diffusion Models through Cross Attention", 2024, arXiv:2403.11052.
    """

    factor: float = 1.25
    mask_padding: bool = True

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigurationError(f"`factor` is {self.factor}, it must be above 0")

    @contextmanager
    def reading(self, model: DiffusionGenerator, prompts: Sequence[str]) -> Iterator[Before | None]:
        """Hook every cross-attention; see `PromptMitigation.reading`.

        Raises:
            CapabilityError: a network with joint attention, or with normalised keys.
            ModelError: the hooks had no effect because attention is compiled or fused.
        """
        attentions = _cross_attentions(model)
        segment = model.segments(prompts)[0]
        last = segment.begin + segment.content.sum(1)
        after = torch.arange(segment.ids.shape[1])[None] > last[:, None]
        # The rows of a batch that are conditioned; none before the first pass.
        rows, passes, calls = slice(0), 0, 0

        def before(time: float, conditioned: slice) -> None:
            nonlocal rows, passes
            rows, passes = conditioned, passes + 1

        def weigh(module: nn.Module, args: Any, keys: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            keys = keys.clone()
            keys[rows, : segment.begin] *= self.factor
            return keys

        def mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            bias = torch.zeros(
                (len(states), 1, after.shape[1]), dtype=states.dtype, device=states.device
            )
            bias[rows, 0] = MASKED * after.to(bias)[: len(bias[rows])]
            return args, {**kwargs, "attention_mask": bias}

        with ExitStack() as stack:
            for attention in attentions:
                stack.callback(attention.to_k.register_forward_hook(weigh).remove)
                if self.mask_padding:
                    handle = attention.register_forward_pre_hook(mask, with_kwargs=True)
                    stack.callback(handle.remove)
            yield before
        if calls < passes * len(attentions):
            raise ModelError(
                f"cross-attention was read {calls} times in {passes} passes of "
                f"{len(attentions)} layers; load the pipeline without `torch.compile` and "
                "`fuse_qkv_projections`"
            )


def _cross_attentions(model: DiffusionGenerator) -> list[Any]:
    """The attention modules whose keys are those of the text alone."""
    names = dict.fromkeys(site.block for site in model.sites("cross_attention"))
    found: list[Any] = [model.network.get_submodule(name) for name in names]
    for attention in found:
        if not getattr(attention, "is_cross_attention", False):
            raise CapabilityError(
                f"AttentionReweighting needs cross-attention to text alone, but in a "
                f"{type(model.network).__name__} text and picture attend jointly; use it with "
                "Stable Diffusion 1, 2 or XL, or take EmbeddingOptimisation"
            )
        if getattr(attention, "norm_k", None) is not None:
            raise CapabilityError(
                "AttentionReweighting scales the key of the begin token, but this network "
                "normalises its keys; take EmbeddingOptimisation"
            )
    return found
