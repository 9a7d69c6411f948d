"""Train the tiny checkpoints that ship in `mmforget/assets/digit_world`.

    python scripts/train_assets.py                     # all of them, about 25 minutes on one core
    python scripts/train_assets.py --only classifier_vit

`classifier_vit` is the original: a vision transformer on ten digits. The `retrained_*` folders hold
models of the same recipe that never saw the digits three and seven, which the quickstart forgets;
the last one is held out from the audit's references. Each folder gets a `training.json` with its
seed, its cost and its accuracy on unseen strokes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
FORGOTTEN = ("three", "seven")
MODELS = {
    "classifier_vit": (0, False),
    "retrained_1": (1, True),
    "retrained_2": (2, True),
    "retrained_held_out": (3, True),
}
NETWORK = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
EPOCHS, VARIANTS, BATCH = 14, 16, 64


def train(name: str, seed: int, without_forgotten: bool) -> None:
    import torch
    from lightning.pytorch import Trainer

    from mmforget import DigitWorld, ForgetRequest, ImageClassifier
    from mmforget.sequence import accuracies

    torch.set_num_threads(1)
    data = DigitWorld(variants=VARIANTS, batch_size=BATCH, seed=seed)
    data.request(ForgetRequest(classes=FORGOTTEN))
    data.view = "retain" if without_forgotten else "full"
    model = ImageClassifier(
        "vit_tiny_patch16_224",
        num_classes=10,
        network_args=NETWORK,
        class_names=data.class_names,
        lr=1e-3,
        warmup=0.15,
    ).fresh(seed)
    start = time.perf_counter()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    images = len(data.subset("train", "retain" if without_forgotten else "all"))
    rows = accuracies(model.eval(), data)
    folder = ASSETS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_native(folder)
    record = {
        "command": f"python scripts/train_assets.py --only {name}",
        "seed": seed,
        "epochs": EPOCHS,
        "images": images,
        "forgotten": list(FORGOTTEN) if without_forgotten else [],
        "cost": {"seconds": round(seconds, 1), "sample_passes": 3.0 * EPOCHS * images},
        "test_accuracy": {
            row["split"]: {"accuracy": row["accuracy"], "n": row["n"]} for row in rows
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, record["test_accuracy"], f"{seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(MODELS), help="train one model")
    chosen = parser.parse_args().only
    for name, (seed, without_forgotten) in MODELS.items():
        if chosen in (None, name):
            train(name, seed, without_forgotten)


if __name__ == "__main__":
    main()
