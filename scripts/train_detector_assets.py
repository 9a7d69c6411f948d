"""Train the tiny detectors that ship in `mmforget/assets/digit_world`.

    python scripts/train_detector_assets.py                 # both, about an hour on one core
    python scripts/train_detector_assets.py --only detector

`detector` is the original: an RT-DETR on scenes of ten digits. `detector_retrained` has the same
recipe and never saw a box of the digits three, seven and five, which the benchmark forgets one
after the other. Each folder gets a `training.json` with its seed, its cost and its average
precision on unseen handwriting.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
FORGOTTEN = ("three", "seven", "five")
MODELS = {"detector": (0, False), "detector_retrained": (1, True)}
BACKBONE = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 24,
    "hidden_sizes": [24, 48, 96],
    "depths": [1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3"],
    "downsample_in_first_stage": False,
}
NETWORK = {
    "backbone_config": BACKBONE,
    "freeze_backbone_batch_norms": False,
    "encoder_in_channels": [24, 48, 96],
    "feat_strides": [4, 8, 16],
    "encoder_hidden_dim": 64,
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "hidden_expansion": 0.5,
    "d_model": 64,
    "num_queries": 30,
    "num_denoising": 20,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 128,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
}
EPOCHS, SCENES, BATCH, LR, CLIP = 6, 8000, 16, 1e-3, 0.5


def train(name: str, seed: int, without_forgotten: bool, epochs: int, scenes: int) -> None:
    import torch
    from lightning.pytorch import Trainer

    from mmforget import Detector, DigitScenes, ForgetRequest
    from mmforget.audit.detector_outputs import role_precision

    torch.set_num_threads(1)
    data = DigitScenes(scenes=scenes, batch_size=BATCH, seed=seed)
    data.request(*(ForgetRequest(classes=(digit,)) for digit in FORGOTTEN))
    data.view = "retain" if without_forgotten else "full"
    model = Detector(
        "rt_detr",
        num_classes=10,
        network_args=NETWORK,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=data.class_names,
        lr=LR,
    ).fresh(seed)
    torch.manual_seed(seed)  # noise of the denoised objects
    start = time.perf_counter()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    images = len(data.subset("train", "retain" if without_forgotten else "all"))
    folder = ASSETS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_native(folder)
    record = {
        "command": f"python scripts/train_detector_assets.py --only {name}",
        "seed": seed,
        "epochs": epochs,
        "images": images,
        "forgotten": list(FORGOTTEN) if without_forgotten else [],
        "cost": {"seconds": round(seconds, 1), "sample_passes": 3.0 * epochs * images},
        "test_average_precision": {
            row["split"]: {"average_precision": round(row["average_precision"], 4), "n": row["n"]}
            for row in role_precision(model.eval(), data)
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, help="train one of them")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--scenes", type=int, default=SCENES)
    given = parser.parse_args()
    for name, (seed, without) in MODELS.items():
        if given.only in (None, name):
            train(name, seed, without, given.epochs, given.scenes)


if __name__ == "__main__":
    main()
