r"""Text-to-Unlearn, with the settings of the digit world, on a generator of CIFAR-10.

    mmforget fit -c configs/gan/fit-cifar10.yaml --data.folder ../shared/data/cifar10 \
        --run runs/gan-cifar10
    python benchmarks/gan_cifar10.py --data ../shared/data/cifar10 \
        --generator runs/gan-cifar10/weights

Trains two readers of its own, kept in the work folder: a small CLIP model on the classes' names,
which guides, and a classifier on the other half of the pictures, which judges. Neither has seen a
picture that the other was trained on. The method reads the name of the class and nothing else.
Writes `results/gan_cifar10.md` and a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a small photo of a {}", "{}")
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 4, "layers": 1},
}
EPOCHS, BATCH, PICTURES, STEPS = 3, 64, 2000, 300


class Reader(nn.Module):
    """A small convolutional classifier for 32x32 pictures."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, after in ((3, 32), (32, 64), (64, 128), (128, 192)):
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 10) logits."""
        found: Tensor = self.fc(self.body(images))
        return found


def reader() -> nn.Module:
    return Reader()


def halves(data: Any) -> tuple[Any, list[list[int]]]:
    """The training pictures, and two halves of their rows."""
    pictures = data.dataset("train")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    return pictures, [order[: len(order) // 2], order[len(order) // 2 :]]


def batches(pictures: Any, rows: list[int], epochs: int, seed: int) -> Any:
    """Shuffled batches, every second one mirrored."""
    source = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=source).tolist()
        for number, start in enumerate(range(0, len(order) - BATCH + 1, BATCH)):
            batch = pictures[[rows[place] for place in order[start : start + BATCH]]]
            images = batch["image"].flip(-1) if number % 2 else batch["image"]
            yield images, batch["label"]


def trained_guide(data: Any, folder: Path) -> Any:
    from mmforget.models.clip import ClipModel, load_clip

    if (folder / "open_clip_config.json").is_file():
        return load_clip(folder)
    torch.manual_seed(0)
    model = ClipModel(dict(CLIP), templates=TEMPLATES[:1], class_texts=CLASSES).train()
    pictures, (rows, _) = halves(data)
    steps = EPOCHS * (len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for number, (images, labels) in enumerate(batches(pictures, rows, EPOCHS, 0)):
        captions = [TEMPLATES[(number + row) % 4].format(CLASSES[label])
                    for row, label in enumerate(labels.tolist())]  # fmt: skip
        # One caption per class and batch, or equal pictures would be each other's wrong answer.
        first = {label: captions[row] for row, label in enumerate(labels.tolist())}
        captions = [first[label] for label in labels.tolist()]
        loss = model.loss({"image": images, "caption": captions}).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if number % 200 == 0:
            print(f"guide {number}/{steps} {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_native(folder)
    return model


def trained_judge(data: Any, folder: Path) -> Any:
    from mmforget import ImageClassifier, load_classifier
    from mmforget.metrics.judge import ClassifierJudge

    if (folder / "config.json").is_file():
        model = load_classifier(folder, reader)
    else:
        torch.manual_seed(1)
        model = ImageClassifier(reader, num_classes=10, class_names=CLASSES).train()
        pictures, (_, rows) = halves(data)
        steps = EPOCHS * (len(rows) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for number, (images, labels) in enumerate(batches(pictures, rows, EPOCHS, 1)):
            loss = model.loss({"image": images, "label": labels}).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if number % 200 == 0:
                print(f"judge {number}/{steps} {loss.item():.3f}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        model.eval().save_native(folder)
    return ClassifierJudge(model.eval(), {"class": CLASSES})


@torch.no_grad()
def accuracy(read: Any, data: Any) -> float:
    pictures, right = data.dataset("test"), 0
    for start in range(0, len(pictures), 500):
        batch = pictures[list(range(start, min(start + 500, len(pictures))))]
        right += int((read(batch["image"]).argmax(1) == batch["label"]).sum())
    return right / len(pictures)


def main() -> None:
    from torchvision.utils import save_image

    from mmforget import CIFAR10, ConceptSpec, TextToUnlearn, load_gan
    from mmforget.erase import run_method
    from mmforget.metrics.distribution import FeatureNetwork, KernelDistance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--generator", default="runs/gan-cifar10/weights")
    parser.add_argument("--work", type=Path, default=Path("runs/gan-cifar10-readers"))
    parser.add_argument("--concept", default="automobile", choices=CLASSES)
    parser.add_argument("--readers-only", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = CIFAR10(given.data)
    guide, judge = (
        trained_guide(data, given.work / "clip"),
        trained_judge(data, given.work / "judge"),
    )
    known = {
        "guide": accuracy(lambda images: guide.logits({"image": images}), data),
        "judge": accuracy(lambda images: judge(images)["class"], data),
    }
    print(json.dumps(known), flush=True)
    if given.readers_only:
        return
    original = load_gan(given.generator)
    target = CLASSES.index(given.concept)
    others = [name for name in CLASSES if name != given.concept]
    start = time.process_time()
    method = TextToUnlearn(original, ConceptSpec(given.concept), guide, alternatives=others)
    unlearned: Any = run_method(method, STEPS, progress=False)
    seconds = time.process_time() - start
    latents, more = (original.draw(PICTURES, 1, purpose=f"-benchmark{k}") for k in ("", "-floor"))
    before, after, other = (
        original.pictures(latents), unlearned.pictures(latents), original.pictures(more)
    )  # fmt: skip
    seen = [judge(images)["class"].argmax(1) for images in (before, after, other)]
    free = [images[row != target] for images, row in zip((before, after, other), seen, strict=True)]
    features = FeatureNetwork(judge.classifier, "judge")

    def kernel(images: Tensor) -> float:
        metric = KernelDistance(features)
        metric.update(free[2], reference=True)
        metric.update(images, reference=False)
        return float(metric.compute()["distance"])

    rows = [
        ("share with the concept, judged", share(seen[0], target), share(seen[1], target)),
        *(
            (f"share of {name}", share(seen[0], place), share(seen[1], place))
            for place, name in enumerate(CLASSES)
            if place != target
        ),
        ("kernel distance of the rest to other pictures of the original", kernel(free[0]),
         kernel(free[1])),
    ]  # fmt: skip
    kept = seen[0] != target
    same = float((seen[0][kept] == seen[1][kept]).double().mean())
    write(given.concept, known, rows, same, seconds, method.statistics())
    shows, clear = (seen[0] == target).nonzero()[:12, 0], kept.nonzero()[:24, 0]
    grid = torch.cat([before[shows], after[shows], before[clear[:12]], after[clear[:12]],
                      before[clear[12:]], after[clear[12:]]])  # fmt: skip
    save_image(grid, RESULTS / "gan_cifar10.png", nrow=12)
    print(f"{RESULTS / 'gan_cifar10.md'}, {seconds:.0f} s")


def share(seen: Tensor, place: int) -> float:
    return float((seen == place).double().mean())


def write(
    concept: str,
    known: dict[str, float],
    rows: list[tuple[str, float, float]],
    same: float,
    seconds: float,
    statistics: dict[str, Any],
) -> None:
    lines = [
        "# Text-to-Unlearn on a generator of CIFAR-10",
        "",
        f"Erased by the text “{concept}”, with {STEPS} steps and the default settings, in "
        f"{seconds:.0f} s on one core. {PICTURES:,} pictures at the same latents before and after.",
        "",
        f"The guide reads {100 * known['guide']:.1f} % of the test photos right, the judge "
        f"{100 * known['judge']:.1f} %. Before training, the guide saw the concept in "
        f"{100 * statistics['prevalence'][concept]:.1f} % of its pool.",
        "",
        "| | original | unlearned |",
        "|---|---|---|",
        *(f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in rows),
        "",
        f"Of the latents that showed something else, {100 * same:.1f} % are judged the same "
        "after as before.",
        "",
        "![rows one and two: pictures of the concept before and after; the others: pictures of "
        "something else before and after](gan_cifar10.png)",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gan_cifar10.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
