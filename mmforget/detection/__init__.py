"""Which prompts are memorized: scores that need no training pictures."""

from __future__ import annotations

# Not on first use, as in other packages: modules are named after their functions, and whoever
# imports a module first would find it here in place of the function.
from mmforget.detection.attention_entropy import attention_entropy
from mmforget.detection.noise_magnitude import noise_magnitude
from mmforget.detection.report import DetectionReport
from mmforget.detection.seed_consistency import largest_clique, seed_consistency
from mmforget.detection.sharpness import sharpness
from mmforget.detection.token_attribution import TokenAttribution, TokenValue, token_attribution

__all__ = [
    "DetectionReport",
    "TokenAttribution",
    "TokenValue",
    "attention_entropy",
    "largest_clique",
    "noise_magnitude",
    "seed_consistency",
    "sharpness",
    "token_attribution",
]
