"""Judge the pictures of the shipped text-to-image models and record it in their `training.json`.

    python scripts/measure_diffusion_assets.py diffusion_unet diffusion_transformer

The judge is the shipped one, an independent classifier; its own accuracy on real pictures is
recorded beside the rates. Prompts name digit, ink and background; about two minutes per model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mmforget.data.digit_world import BACKGROUNDS, DIGITS, INKS
from mmforget.metrics.judge import load_judge
from mmforget.models.diffusion import load_generator

ASSETS = Path(__file__).resolve().parents[1] / "mmforget" / "assets" / "digit_world"
SEED, STEPS, GUIDANCE = 0, 20, 3.0


def measure(folder: Path, n: int) -> dict[str, object]:
    """Rates of digit, ink and background over all 60 pairs of digit and ink, n pictures each."""
    model, judge = load_generator(folder, steps=STEPS, guidance=GUIDANCE), load_judge()
    grounds = list(BACKGROUNDS)
    wanted = [
        (digit, ink, grounds[(row + column) % len(grounds)])
        for row, digit in enumerate(DIGITS)
        for column, ink in enumerate(INKS)
    ]
    prompts = [f"a {ink} {digit} on a {ground} background" for digit, ink, ground in wanted]
    seen = judge(model.generate(prompts, n=n, seed=SEED))
    facts = [facts for facts in wanted for _ in range(n)]
    rates: dict[str, object] = {}
    for column, factor in enumerate(("digit", "ink", "background")):
        values = judge.factors[factor]
        hits = seen[factor].argmax(1) == torch.tensor([values.index(row[column]) for row in facts])
        rates[factor] = round(hits.float().mean().item(), 4)
        if factor != "background":
            rates[f"{factor}s"] = {
                value: round(hits[[row[column] == value for row in facts]].float().mean().item(), 4)
                for value in values
            }
    return {
        "rates": rates,
        "pictures": len(facts),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "seed": SEED,
        "judge_test_accuracy": judge.accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("-n", type=int, default=10, help="pictures per prompt (default 10)")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models:
        folder = ASSETS / name
        found = measure(folder, given.n)
        print(name, json.dumps(found, indent=1))
        if not given.dry_run:
            file = folder / "training.json"
            record = json.loads(file.read_text()) | {"judged": found}
            file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
