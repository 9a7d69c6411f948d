"""Train the small GANs of the digit world that ship in `mmforget/assets/digit_world`.

    python scripts/train_gan_assets.py gan                # about 20 minutes on one core each
    python scripts/train_gan_assets.py gan_conditional
    python scripts/train_gan_assets.py gan_without_seven  # never sees a seven
    python scripts/train_gan_assets.py gan_without_red    # never sees red ink

The last two are the retrained references of `gan`: the same recipe without what is to be erased.
Each folder gets a `training.json` with its seed, its cost, and what the shipped judge, which had no
part in it, sees in 2,000 pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
STEPS, BATCH, VARIANTS = 5000, 64, 24
MODELS: dict[str, dict[str, Any]] = {
    "gan": {"seed": 0, "forget": None},
    "gan_conditional": {"seed": 0, "forget": None, "steps": 3000},
    "gan_without_seven": {"seed": 0, "forget": ("digit", "seven")},
    "gan_without_red": {"seed": 0, "forget": ("ink", "red")},
}
PICTURES = 2000


def train(name: str, steps: int, folder: Path) -> dict[str, Any]:
    import torch
    from lightning.pytorch import Trainer

    from mmforget import DigitWorld, ForgetRequest, ImageGAN

    torch.set_num_threads(1)
    seed, forget = MODELS[name]["seed"], MODELS[name]["forget"]
    label = forget[0] if forget else "digit"
    data = DigitWorld(variants=VARIANTS, batch_size=BATCH, seed=seed, label=label)
    if forget:
        data.request(ForgetRequest(classes=[forget[1]]))
        data.view = "retain"
    conditional = name == "gan_conditional"
    model = ImageGAN(
        "dcgan",
        network_args={"num_classes": 10} if conditional else {},
        class_names=data.class_names if conditional else (),
        lr=3e-4,
        beta1=0.0,
    ).fresh(seed)
    model.network.to(memory_format=torch.channels_last)
    start = time.process_time()
    trainer = Trainer(
        max_steps=2 * steps,  # each step is one of the generator and one of the discriminator
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    seconds = time.process_time() - start
    model.network.to(memory_format=torch.contiguous_format)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name != "gan":
        model.discriminator = None  # only methods that need one are tried on `gan`
    model.eval().save_native(folder)
    record = {
        "command": f"python scripts/train_gan_assets.py {name}",
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "forgotten": list(forget or ()),
        "cost": {"seconds": round(seconds, 1), "sample_passes": 12.0 * steps * BATCH},
        "judged": judged(model),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def judged(model: Any) -> dict[str, Any]:
    """What the judge sees in pictures of the generator."""
    from mmforget import load_judge

    judge = load_judge()
    images = model.pictures(model.draw(PICTURES, 1))
    found = {}
    for factor, probability in judge(images).items():
        share = probability.argmax(1).bincount(minlength=probability.shape[1]) / PICTURES
        found[factor] = {
            "rates": dict(zip(judge.factors[factor], share.tolist(), strict=True)),
            "confidence": round(float(probability.max(1).values.mean()), 4),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=MODELS)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--out", type=Path, default=ASSETS)
    given = parser.parse_args(arguments)
    for name in given.names:
        steps = given.steps or MODELS[name].get("steps", STEPS)
        print(name, json.dumps(train(name, steps, given.out / name)["judged"]), flush=True)


if __name__ == "__main__":
    main()
