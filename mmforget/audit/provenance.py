"""Where a result comes from: versions, hardware, duration, command."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchmetrics",
    "lightning",
    "scikit-learn",
    "numpy",
    "transformers",
    "diffusers",
    "open_clip_torch",
)


def environment(device: torch.device, seconds: float, command: str) -> dict[str, Any]:
    """Facts about the machine and the run.

    Args:
        device: that the models were measured on.
        seconds: of the audit.
        command: that started it.
    """
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # optional, and then it played no part
            continue
    return {
        "versions": versions,
        "hardware": hardware or platform.machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "audit_seconds": round(seconds, 2),
        "command": command,
    }
