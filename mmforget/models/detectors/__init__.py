"""Detection networks of transformers and torchvision behind one contract."""

from __future__ import annotations
