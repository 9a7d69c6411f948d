"""Guidance beyond the plain classifier-free one, for sampling with `DiffusionGenerator`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, WeightsError, suggest
from mmforget.models.base import PromptEmbedding


class Preset(NamedTuple):
    """Strength of safe guidance, see `SafeGuidance`."""

    warmup: int
    scale: float
    threshold: float
    momentum: float
    decay: float


PRESETS: Mapping[str, Preset] = {
    "weak": Preset(15, 200.0, 0.0, 0.0, 0.0),
    "medium": Preset(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": Preset(7, 2000.0, 0.025, 0.5, 0.7),
    "max": Preset(0, 5000.0, 1.0, 0.5, 0.7),
}
"""Those of the paper. diffusers has 20 instead of 200 as the scale of ``weak``."""


@dataclass(frozen=True)
class SafeGuidance:
    """Guidance that leads away from prompts, element by element (safe latent diffusion).

    With predictions e(c) for the prompt, e(S) for what shall not be seen, and e(0)::

        phi     = clamp(|e(c) - e(S)| * scale, max=1)
        mu      = phi where e(c) - e(S) < threshold, else 0
        gamma_i = mu * (e(S) - e(0)) + momentum * nu_i
        nu_i+1  = decay * nu_i + (1 - decay) * gamma_i,    nu_0 = 0
        guided  = e(0) + g * (e(c) - e(0) - [i >= warmup] * gamma_i)

    i counts sampling steps, not times; `nu` also grows during warm-up. Several prompts S have a
    gamma each, and their sum is subtracted. Predictions are used as the network gives them, be
    they noise, velocity or flow.

    Args:
        prompts: what shall not be seen; one text may list several words.
        warmup: steps without influence, delta in the paper.
        scale: s_S in the paper; below 1 there is no safe guidance at all.
        threshold: lambda in the paper.
        momentum: s_m in the paper.
        decay: beta_m in the paper, in [0, 1).

    Raises:
        ConfigurationError: no prompt, or a setting out of range.

    Reference:
        P. Schramowski, M. Brack, B. Deiseroth, K. Kersting: Safe Latent Diffusion, CVPR 2023,
        arXiv 2211.05105.
    """

    prompts: tuple[str, ...]
    warmup: int = PRESETS["medium"].warmup
    scale: float = PRESETS["medium"].scale
    threshold: float = PRESETS["medium"].threshold
    momentum: float = PRESETS["medium"].momentum
    decay: float = PRESETS["medium"].decay

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts or not all(text.strip() for text in self.prompts):
            raise ConfigurationError(
                "`prompts` of the guidance is empty; say what to lead away from"
            )
        for name in ("warmup", "scale", "threshold", "momentum"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"`{name}` is {getattr(self, name)}, it must be 0 or more")
        if not 0 <= self.decay < 1:
            raise ConfigurationError(f"`decay` is {self.decay}, it must be in [0, 1)")

    @classmethod
    def preset(cls, name: str, prompts: Sequence[str]) -> SafeGuidance:
        """One of `PRESETS`: ``weak``, ``medium``, ``strong`` or ``max``.

        Raises:
            ConfigurationError: an unknown name.
        """
        if name not in PRESETS:
            raise ConfigurationError(f"`preset` is '{name}', {suggest(name, PRESETS)}")
        return cls(tuple(prompts), *PRESETS[name])

    def prepare(self, model: Any) -> PromptEmbedding:
        """Embed the prompts."""
        found: PromptEmbedding = model.encode(list(self.prompts))
        return found

    def guide(
        self,
        step: int,
        conditional: Tensor,
        unconditional: Tensor,
        further: Tensor,
        scale: float,
        state: dict[str, Tensor],
    ) -> Tensor:
        """Combine the predictions of one step; see `mmforget.models.diffusion.Guider`."""
        direction = conditional - unconditional
        if self.scale >= 1:
            apart = conditional - further
            phi = (apart.abs() * self.scale).clamp(max=1)
            mu = torch.where(apart < self.threshold, phi, torch.zeros_like(phi))
            before = state.get("momentum", torch.zeros_like(further))
            gamma = mu * (further - unconditional) + self.momentum * before
            state["momentum"] = self.decay * before + (1 - self.decay) * gamma
            if step >= self.warmup:
                direction = direction - gamma.sum(0)
        return unconditional + scale * direction

    def to_dict(self) -> dict[str, Any]:
        """Settings, for `load_guidance`."""
        return {"guidance": type(self).__name__} | asdict(self) | {"prompts": list(self.prompts)}


def load_guidance(data: Mapping[str, Any]) -> SafeGuidance:
    """Inverse of `SafeGuidance.to_dict`.

    Raises:
        WeightsError: another guidance, or fields that it does not have.
    """
    given = dict(data)
    name = given.pop("guidance", None)
    if name != SafeGuidance.__name__:
        raise WeightsError(
            f"the guidance file names '{name}', but only '{SafeGuidance.__name__}' is known; "
            "it may come from a newer version of mmforget"
        )
    known = [field.name for field in fields(SafeGuidance)]
    for key in given:
        if key not in known:
            raise WeightsError(f"the guidance file has the field '{key}'; {suggest(key, known)}")
    if "prompts" not in given:
        raise WeightsError("the guidance file has no `prompts`; write it again with `save_native`")
    return SafeGuidance(**given)
