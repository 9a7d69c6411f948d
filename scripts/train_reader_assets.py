"""Train the models that look at pictures of the digit world for audits.

    python scripts/train_reader_assets.py judge    # about 5 minutes on one core
    python scripts/train_reader_assets.py clip     # about 9 minutes on one core

`judge` is a small ConvNeXt in timm's format that reads digit, ink and background; it shares no
weights and no recipe with the generators it judges. `clip` is an open_clip folder with its own
tokenizer. Both learn from the training strokes and are measured on unseen handwriting.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.data.digit_captions import (
    DIGIT_SYNONYMS,
    DIGIT_TEMPLATES,
    INK_SYNONYMS,
    INK_TEMPLATES,
    PROMPT_LENGTH,
    WORDS,
    captions,
)
from mmforget.data.digit_world import (
    BACKGROUNDS,
    DIGITS,
    INKS,
    VARIANTS,
    facts,
    render,
    stage_strokes,
)
from mmforget.seeds import generator
from mmforget.testing.word_tokenizer import word_tokenizer

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
SEED, DRAWINGS = 1, 400
FACTORS = {"digit": DIGITS, "ink": tuple(INKS), "background": tuple(BACKGROUNDS)}


def ids(step: int, batch: int, purpose: str, stage: str = "train") -> np.ndarray:
    """Sample ids of one batch."""
    strokes = stage_strokes()[stage]  # type: ignore[index]
    draw = generator(SEED, purpose, step)
    rows = torch.randint(len(strokes), (batch,), generator=draw).numpy()
    variants = torch.randint(DRAWINGS, (batch,), generator=draw).numpy()
    return np.asarray(strokes[rows] * VARIANTS + variants)


def pictures(sample_ids: np.ndarray, draw: torch.Generator | None = None) -> Tensor:
    """(B, 3, 32, 32) in [0, 1]; with a generator, softened and noisy as generated ones are."""
    x = render(sample_ids).float() / 255
    if draw is None:
        return x
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(len(x), 1, 1, 1, generator=draw) * 0.6
    noise = torch.randn(x.shape, generator=draw) * 0.06
    strength = torch.rand(len(x), 1, 1, 1, generator=draw)
    return (torch.lerp(x, soft, amount) + noise * strength).clamp(0, 1)


def test_ids() -> np.ndarray:
    """Four drawings of every test stroke, from variants that training never shows."""
    strokes = stage_strokes()["test"]
    return (strokes[:, None] * VARIANTS + np.arange(900, 904)).reshape(-1)


def labels(sample_ids: np.ndarray) -> dict[str, Tensor]:
    rows = facts(sample_ids)
    return {
        factor: torch.tensor([names.index(getattr(row, factor)) for row in rows])
        for factor, names in FACTORS.items()
    }


def write(folder: Path, record: dict[str, object]) -> None:
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(folder.name, json.dumps(record), flush=True)


# ---- judge ----------------------------------------------------------------------


def train_judge(steps: int = 3000, batch: int = 64, lr: float = 2e-3) -> None:
    from mmforget.models.classifier import ImageClassifier

    start = time.process_time()
    widths = [len(names) for names in FACTORS.values()]
    model = ImageClassifier(
        "convnext_atto",
        num_classes=sum(widths),
        network_args={"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 96), "patch_size": 2},
        class_names=[name for names in FACTORS.values() for name in names],
    ).fresh(SEED)
    print("judge", sum(p.numel() for p in model.parameters()), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for step in range(steps):
        rows = ids(step, batch, "judge")
        images = pictures(rows, generator(SEED, "judge-noise", step))
        found = model.logits({"image": images}).split(widths, dim=1)
        losses = [
            F.cross_entropy(one, want)
            for one, want in zip(found, labels(rows).values(), strict=True)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"judge {step} {loss.item():.3f} {time.process_time() - start:.0f} s", flush=True)
    model.eval()
    rows = test_ids()
    with torch.no_grad():
        found = torch.cat(
            [model.logits({"image": pictures(part)}) for part in np.array_split(rows, 10)]
        ).split(widths, dim=1)
    right = {
        factor: round((one.argmax(1) == want).float().mean().item(), 4)
        for (factor, want), one in zip(labels(rows).items(), found, strict=True)
    }
    folder = ASSETS / "judge"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_native(folder)
    write(
        folder,
        {
            "command": "python scripts/train_reader_assets.py judge",
            "seed": SEED,
            "steps": steps,
            "batch": batch,
            "factors": {factor: list(names) for factor, names in FACTORS.items()},
            "seconds": round(time.process_time() - start, 1),
            "test_accuracy": right,
            "test_images": len(rows),
        },
    )


# ---- clip ----------------------------------------------------------------------


def train_clip(steps: int = 2000, batch: int = 128, lr: float = 1e-3) -> None:
    import open_clip
    from safetensors.torch import save_file

    start = time.process_time()
    tokenizer = word_tokenizer(WORDS, PROMPT_LENGTH)
    config = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "layers": 4,
            "width": 96,
            "head_width": 24,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": PROMPT_LENGTH,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "digit_world",
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    }
    torch.manual_seed(SEED)
    model = open_clip.CLIP(**config)
    print("clip", sum(p.numel() for p in model.parameters()), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for step in range(steps):
        rows = ids(step, batch, "clip")
        images = pictures(rows, generator(SEED, "clip-noise", step))
        texts = captions(rows, 10_000 + step)
        image = F.normalize(model.encode_image(images * 2 - 1), dim=-1)
        text = F.normalize(model.encode_text(tokens(tokenizer, texts)), dim=-1)
        scores = model.logit_scale.exp() * image @ text.T
        # A short caption is true of many pictures of the batch; all of them are positives.
        true = truths(rows, texts)
        loss = (
            -(F.log_softmax(scores, 0) * true / true.sum(0, keepdim=True)).sum() / batch
            - (F.log_softmax(scores, 1) * true / true.sum(1, keepdim=True)).sum() / batch
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        if step % 100 == 0:
            print(f"clip {step} {loss.item():.3f} {time.process_time() - start:.0f} s", flush=True)
    model.eval()
    folder = ASSETS / "clip"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n"
    )
    tokenizer.save_pretrained(folder)
    rows = test_ids()
    with torch.no_grad():
        image = F.normalize(
            torch.cat([model.encode_image(pictures(p) * 2 - 1) for p in np.array_split(rows, 10)]),
            dim=-1,
        )
        right = {}
        for factor, templates in (("digit", DIGIT_TEMPLATES), ("ink", INK_TEMPLATES)):
            text = torch.stack(
                [
                    F.normalize(
                        F.normalize(
                            model.encode_text(tokens(tokenizer, [t.format(n) for t in templates])),
                            dim=-1,
                        ).mean(0),
                        dim=-1,
                    )
                    for n in FACTORS[factor]
                ]
            )
            hit = (image @ text.T).argmax(1) == labels(rows)[factor]
            right[factor] = round(hit.float().mean().item(), 4)
    write(
        folder,
        {
            "command": "python scripts/train_reader_assets.py clip",
            "seed": SEED,
            "steps": steps,
            "batch": batch,
            "seconds": round(time.process_time() - start, 1),
            "zero_shot_test_accuracy": right,
            "test_images": len(rows),
        },
    )


def tokens(tokenizer: object, texts: list[str]) -> Tensor:
    rows = tokenizer(texts, padding="max_length", max_length=PROMPT_LENGTH)  # type: ignore[operator]
    return torch.tensor(rows.input_ids)


def truths(sample_ids: np.ndarray, texts: list[str]) -> Tensor:
    """(B, B) 1 where caption j is true of picture i."""
    meaning = {word: ("digit", word) for word in DIGITS}
    meaning |= {number: ("digit", word) for word, number in DIGIT_SYNONYMS.items()}
    meaning |= {word: ("ink", word) for word in INKS}
    meaning |= {other: ("ink", word) for word, other in INK_SYNONYMS.items()}
    meaning |= {word: ("background", word) for word in BACKGROUNDS}
    named = [dict(meaning[word] for word in text.split() if word in meaning) for text in texts]
    rows = facts(sample_ids)
    return torch.tensor(
        [[all(getattr(r, f) == v for f, v in n.items()) for n in named] for r in rows]
    ).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["judge", "clip"])
    which = parser.parse_args().which
    torch.set_num_threads(1)
    train_judge() if which == "judge" else train_clip()


if __name__ == "__main__":
    main()
