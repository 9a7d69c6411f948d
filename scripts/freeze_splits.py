"""Freeze which handwritten digits of scikit-learn are for training, validation and test.

python scripts/freeze_splits.py    (one second; writes mmforget/assets/digit_world_split.json)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmforget.data.digit_world import SPLIT_FILE, strokes, strokes_hash
from mmforget.data.hashing import uniform
from mmforget.data.split import lowest_share, write_hashed

TARGET = Path(__file__).parents[1] / "mmforget" / "assets" / SPLIT_FILE


def main() -> None:
    """Draw 60 / 15 / 25 per cent, stratified by digit."""
    digit = strokes()[1]
    order = uniform(np.arange(len(digit)), 0, "digit-world-strokes")
    train, seen = lowest_share(order, digit, 0.60), lowest_share(order, digit, 0.75)
    write_hashed(
        TARGET,
        {
            "source": "scikit-learn, sklearn/datasets/data/digits.csv.gz, row numbers",
            "strokes_sha256": strokes_hash(),
            "train": np.flatnonzero(train).tolist(),
            "val": np.flatnonzero(seen & ~train).tolist(),
            "test": np.flatnonzero(~seen).tolist(),
        },
    )


if __name__ == "__main__":
    main()
