"""Train the tiny multimodal language models that ship in `mmforget/assets/digit_world`.

    python scripts/train_multimodal_assets.py --only multimodal
    python scripts/train_multimodal_assets.py --only multimodal_retrained

`multimodal` is the original: a LLaVA that answers all questions of `DigitQuestions`.
`multimodal_retrained` has the same recipe from other fresh weights and never saw who the digits
three and seven are (`--forget` for other persons, `--into` for another folder, `--seed` for other
weights). Each folder gets a `training.json` with its seed, its cost and its share of exactly right
answers on unseen handwriting. One model takes 27 minutes of a core (measured on a busy machine).
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
FORGOTTEN = ("david", "henry")
MODELS = {"multimodal": (0, False), "multimodal_retrained": (1, True)}
PATCH, GRID = 4, 8
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
}
LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ ' ASSISTANT: ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ ' <image> ' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
VARIANTS, SCENES = 16, 8000
TOWER = {"steps": 4000, "pictures": 64, "lr": 2e-3, "weight_decay": 0.02}
WHOLE = {"steps": 4500, "records": 32, "lr": 7e-4, "weight_decay": 0.01}
SHARES = {
    "name": 0.13,
    "both": 0.17,
    "harmless": 0.24,
    "text": 0.1,
    "list": 0.12,
    "position": 0.07,
    "colour": 0.1,
    "count": 0.02,
    "read_then_answer": 0.05,
}
REDUCED = 0.2
"""Share of the pictures whose visual tokens are pooled or thinned out, so that a model that sees
fewer of them meets nothing new."""
LOOK_AGAIN = 0.2
"""Share of the lists in the middle of which the picture is shown once more, pooled; in half of them
it is not shown before."""


def build(seed: int) -> tuple[Any, Any]:
    """A network of random weights, and its processor."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from mmforget.data.digit_words import WORDS
    from mmforget.testing.tiny_multimodal import sentence_tokenizer

    tokenizer = sentence_tokenizer(WORDS, ["<image>"], chat_template=TEMPLATE)
    config = LlavaConfig(
        vision_config=VISION,
        text_config=LANGUAGE | {"vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"height": PATCH * GRID, "width": PATCH * GRID}, do_center_crop=False
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    network = LlavaForConditionalGeneration(config)
    network.generation_config.pad_token_id = 0
    network.generation_config.bos_token_id = 1
    network.generation_config.eos_token_id = 2
    return network, processor


class Recipe:
    """Trains one model in two stages; everything is drawn by one seed.

    Args:
        seed: of weights and draws.
        forgotten: persons whose forget set is left out of training.
    """

    def __init__(self, seed: int, forgotten: Sequence[str]) -> None:
        import torch

        from mmforget import ForgetRequest
        from mmforget.data.digit_questions import DigitQuestions

        self.torch, self.seed, self.forgotten = torch, seed, tuple(forgotten)
        self.network, self.processor = build(seed)
        self.data = DigitQuestions(variants=VARIANTS, scenes=SCENES)
        if forgotten:
            self.data.request(ForgetRequest(classes=self.forgotten))
        images = self.processor.image_processor
        self.mean = torch.tensor(images.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(images.image_std).view(1, 3, 1, 1)
        self.image_token = int(self.network.config.image_token_id)
        self.prompts: dict[tuple[str, bool], list[int]] = {}

    def pixels(self, pictures: Any) -> Any:
        """Normalise uint8 pictures (N, 3, 32, 32) as the image processor does."""
        return (pictures.float() / 255 - self.mean) / self.std

    def schedule(self, optimizer: Any, lr: float, steps: int) -> Any:
        """Warm up over a tenth of the steps, then go down to nothing."""
        return self.torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)

    # ---- the tower --------------------------------------------------------------------------

    def train_tower(self, steps: int) -> dict[str, float]:
        """Let linear heads read every cell of scenes, and single digits, from the mean of patches.

        The means are taken over a random half of the patches: what a cell shows is then known all
        over the cell.
        """
        from mmforget.data.digit_world import stage_strokes

        torch = self.torch
        tower = self.network.model.vision_tower
        width = VISION["hidden_size"]
        sizes = {"cell_digit": 11, "cell_ink": 7, "digit": 10, "ink": 6, "background": 6}
        heads = torch.nn.ModuleDict({n: torch.nn.Linear(width, s) for n, s in sizes.items()})
        optimizer = torch.optim.AdamW(
            [*tower.parameters(), *heads.parameters()],
            lr=TOWER["lr"],
            weight_decay=TOWER["weight_decay"],
        )
        schedule = self.schedule(optimizer, TOWER["lr"], steps)
        draw = torch.Generator().manual_seed(self.seed + 1)
        chosen = stage_strokes()["train"]
        tower.train()
        for step in range(steps):
            pictures, wanted = self.facts_batch(chosen, draw, TOWER["pictures"] // 2)
            states = tower(pixel_values=self.pixels(pictures)).last_hidden_state[:, 1:]
            mask = (torch.rand(states.shape[:2], generator=draw) < 0.5).float()
            found = self.read_heads(heads, states, mask)
            losses = [
                torch.nn.functional.cross_entropy(found[name], wanted[name], label_smoothing=0.05)
                * (1.0 if "digit" in name else 0.5)
                for name in sizes
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 250 == 0 or step + 1 == steps:
                print(f"tower {step}: {float(sum(losses)):.3f}", flush=True)
        tower.eval()
        with torch.no_grad():
            pictures, wanted = self.facts_batch(stage_strokes()["test"], draw, 1000)
            states = tower(pixel_values=self.pixels(pictures)).last_hidden_state[:, 1:]
            found = self.read_heads(heads, states, torch.ones(states.shape[:2]))
        right = {n: float((found[n].argmax(-1) == wanted[n]).float().mean()) for n in sizes}
        print("tower", {n: round(v, 4) for n, v in right.items()}, flush=True)
        return right

    def facts_batch(self, chosen: Any, draw: Any, number: int) -> tuple[Any, dict[str, Any]]:
        """`number` single digits and as many scenes of some strokes, with what they show."""
        import numpy as np

        from mmforget.data.cell_scenes import ScenePlan
        from mmforget.data.digit_world import VARIANTS as ALL
        from mmforget.data.digit_world import _Drawing, render, strokes

        torch = self.torch
        strokes_drawn = chosen[torch.randint(len(chosen), (number,), generator=draw).numpy()]
        ids = strokes_drawn * ALL + torch.randint(ALL, (number,), generator=draw).numpy()
        numbers = torch.randint(2**40, (number,), generator=draw).numpy()
        plan, drawing = ScenePlan.of(numbers, chosen), _Drawing.of(ids)
        digit = strokes()[1]
        wanted = {
            "cell_digit": np.where(plan.used, digit[plan.stroke], 10).reshape(-1),
            "cell_ink": np.where(plan.used, plan.ink, 6).reshape(-1),
            "digit": digit[strokes_drawn],
            "ink": drawing.ink,
            "background": np.concatenate([drawing.background, plan.background]),
        }
        pictures = torch.cat([render(ids), plan.render()])
        return pictures, {name: torch.from_numpy(value) for name, value in wanted.items()}

    def read_heads(self, heads: Any, states: Any, mask: Any) -> dict[str, Any]:
        """What the heads say of patches (B, 64, D), of which only the marked ones count."""
        half = len(states) // 2
        grid = states.unflatten(1, (GRID, GRID))
        weight = mask.unflatten(1, (GRID, GRID))[..., None]

        def mean(rows: slice, high: slice, wide: slice) -> Any:
            part, own = grid[rows, high, wide].flatten(1, 2), weight[rows, high, wide].flatten(1, 2)
            return (part * own).sum(1) / own.sum(1).clamp(min=1)

        sides = (slice(0, GRID // 2), slice(GRID // 2, GRID))
        cells = self.torch.stack(
            [mean(slice(half, None), high, wide) for high in sides for wide in sides], dim=1
        ).flatten(0, 1)
        whole = mean(slice(None), slice(None), slice(None))
        return {
            "cell_digit": heads["cell_digit"](cells),
            "cell_ink": heads["cell_ink"](cells),
            "digit": heads["digit"](whole[:half]),
            "ink": heads["ink"](whole[:half]),
            "background": heads["background"](whole),
        }

    # ---- the language model -------------------------------------------------------------------

    def prompt(self, question: str, pictures: int) -> list[int]:
        """Ids of the prompt, with one placeholder per picture."""
        key = (question, bool(pictures))
        if key not in self.prompts:
            content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            self.prompts[key] = self.processor.tokenizer(text)["input_ids"]
        return self.prompts[key]

    def reduce(self, features: Any, kind: str, draw: Any) -> Any:
        """Pool visual tokens (64, D) by 2 or 4, or keep a random half or quarter of them."""
        torch = self.torch
        if kind.startswith("pool"):
            size = int(kind[4:])
            grid = features.T.unflatten(1, (GRID, GRID))[None]
            return torch.nn.functional.avg_pool2d(grid, size)[0].flatten(1).T
        kept = len(features) // int(kind[4:])
        order = torch.randperm(len(features), generator=draw)[:kept].sort().values
        return features[order]

    def encode(self, batch: dict[str, Any], draw: Any | None) -> tuple[Any, Any, Any]:
        """Embeddings (B, L, D), attention mask and labels (B, L) of records.

        With `draw`, visual tokens are reduced and pictures shown again at random, as in training.
        """
        torch, core = self.torch, self.network.model
        pictures = [group[0] for group in batch["images"] if group]
        features = iter(())
        if pictures:
            with torch.no_grad():
                states = core.vision_tower(pixel_values=self.pixels(torch.stack(pictures)))
            features = iter(core.multi_modal_projector(states.last_hidden_state[:, 1:]))
        tokenizer, rows, visual = self.processor.tokenizer, [], []

        def chance() -> float:
            return 1.0 if draw is None else float(torch.rand((), generator=draw))

        def option(*choices: str) -> str:
            return choices[int(torch.randint(len(choices), (), generator=draw))]

        for question, answer, kind, group in zip(
            batch["question"], batch["answer"], batch["question_kind"], batch["images"], strict=True
        ):
            words = answer.split()
            again = kind == "list" and len(words) > 1 and chance() < LOOK_AGAIN
            blind = again and chance() < 0.5
            own = next(features) if group else None
            ids = [(token, False) for token in self.prompt(question, 0 if blind else len(group))]
            blocks = []
            if group and not blind:
                reduced = chance() < REDUCED
                kept = self.reduce(own, option("pool2", "thin2", "thin4"), draw) if reduced else own
                blocks.append(kept)
            if again:
                cut = 1 + int(torch.randint(len(words) - 1, (), generator=draw))
                blocks.append(self.reduce(own, option("pool2", "pool4"), draw))
                first = " ".join([*words[:cut], "look again"])
                ids += [(token, not blind) for token in tokenizer(first)["input_ids"]]
                ids += [(self.image_token, False)]
                words = words[cut:]
            ids += [(token, True) for token in tokenizer(" ".join(words))["input_ids"]]
            ids += [(tokenizer.eos_token_id, True)]
            place, expanded = 0, []
            for token, labelled in ids:
                if token == self.image_token:
                    expanded += [(token, False)] * len(blocks[place])
                    place += 1
                else:
                    expanded.append((token, labelled))
            rows.append(expanded)
            visual += blocks
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor([token for token, _ in row])
            mask[number, : len(row)] = 1
            labels[number, : len(row)] = torch.tensor([t if on else -100 for t, on in row])
        embedded = core.language_model.embed_tokens(ids)
        if visual:
            where = (ids == self.image_token)[..., None].expand_as(embedded)
            embedded = embedded.masked_scatter(where, torch.cat(visual).to(embedded.dtype))
        return embedded, mask, labels

    def answered(self, batch: dict[str, Any], draw: Any | None) -> tuple[Any, Any, Any]:
        """Logits and labels of all labelled tokens, and the rows they belong to."""
        embedded, mask, labels = self.encode(batch, draw)
        states = self.network.model.language_model(inputs_embeds=embedded, attention_mask=mask)
        wanted = labels[:, 1:] != -100
        logits = self.network.lm_head(states.last_hidden_state[:, :-1][wanted])
        return logits, labels[:, 1:][wanted], wanted.nonzero()[:, 0]

    def train_language(self, steps: int) -> None:
        """Teach language model and projector to answer; the tower is frozen."""
        torch = self.torch
        role = "retain" if self.forgotten else "all"
        data = self.data.subset("train", role)
        rows = {kind: torch.from_numpy((data.kinds == kind).nonzero()[0]) for kind in SHARES}
        kinds, shares = list(SHARES), torch.tensor(list(SHARES.values()))
        trained = [
            *self.network.model.language_model.parameters(),
            *self.network.model.multi_modal_projector.parameters(),
            *self.network.lm_head.parameters(),
        ]
        optimizer = torch.optim.AdamW(
            trained, lr=WHOLE["lr"], betas=(0.9, 0.98), weight_decay=WHOLE["weight_decay"]
        )
        schedule = self.schedule(optimizer, WHOLE["lr"], steps)
        draw = torch.Generator().manual_seed(self.seed + 2)
        self.network.model.vision_tower.requires_grad_(False)
        start, running = time.perf_counter(), 0.0
        for step in range(steps):
            picked = torch.multinomial(shares, WHOLE["records"], replacement=True, generator=draw)
            places = [
                int(rows[kinds[k]][torch.randint(len(rows[kinds[k]]), (), generator=draw)])
                for k in picked.tolist()
            ]
            logits, labels, _ = self.answered(data[places], draw)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            running = 0.98 * running + 0.02 * float(loss.detach())
            if step % 250 == 0 or step + 1 == steps:
                spent = time.perf_counter() - start
                print(f"language {step}: {running:.3f} ({spent:.0f} s)", flush=True)
                if step % 1000 == 0 and step:
                    print(json.dumps(self.measure("val", 100)), flush=True)
        self.network.model.vision_tower.requires_grad_(True)

    def measure(self, stage: str, limit: int | None = None) -> dict[str, dict[str, Any]]:
        """Share of exactly right answers by kind and role.

        A greedy answer is right exactly if every token is the likeliest one after the right ones.
        """
        torch = self.torch
        found: dict[str, dict[str, Any]] = {}
        for kind in SHARES:
            roles = ("forget", "retain") if self.forgotten else ("all",)
            for role in roles:
                data = self.data.probe(stage, kind, role)
                size = len(data) if limit is None else min(limit, len(data))
                if not size:
                    continue
                wrong = 0
                with torch.no_grad():
                    for first in range(0, size, 64):
                        part = list(range(first, min(first + 64, size)))
                        logits, labels, rows = self.answered(data[part], None)
                        wrong += len(set(rows[logits.argmax(-1) != labels].tolist()))
                name = kind if role == "all" else f"{kind}/{role}"
                found[name] = {"exact": round(1 - wrong / size, 4), "n": size}
        return found


def train(
    name: str, seed: int, forgotten: Sequence[str], folder: Path, tower: int, steps: int
) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    start, cpu = time.perf_counter(), time.process_time()
    recipe = Recipe(seed, forgotten)
    reads = recipe.train_tower(tower)
    recipe.train_language(steps)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    exact = recipe.measure("test")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe.network.save_pretrained(folder)
    recipe.processor.save_pretrained(folder)
    record = {
        "command": f"python scripts/train_multimodal_assets.py --only {name}",
        "seed": seed,
        "forgotten": list(forgotten),
        "recipe": {
            "tower": TOWER | {"steps": tower},
            "language": WHOLE | {"steps": steps},
            "shares": SHARES,
            "reduced": REDUCED,
            "look_again": LOOK_AGAIN,
            "variants": VARIANTS,
            "scenes": SCENES,
        },
        "parameters": sum(p.numel() for p in recipe.network.parameters()),
        "cost": {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "sample_passes": 3.0 * (tower * TOWER["pictures"] + steps * WHOLE["records"]),
        },
        "tower_reads_unseen_strokes": {key: round(value, 4) for key, value in reads.items()},
        "test_exact_answers": exact,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, help="train one of them")
    parser.add_argument("--forget", nargs="+", default=FORGOTTEN, help="persons to leave out")
    parser.add_argument("--seed", type=int, help="of weights and draws")
    parser.add_argument("--into", type=Path, default=ASSETS, help="folder of the model folders")
    parser.add_argument("--tower-steps", type=int, default=TOWER["steps"])
    parser.add_argument("--steps", type=int, default=WHOLE["steps"])
    given = parser.parse_args()
    for name, (seed, without) in MODELS.items():
        if given.only in (None, name):
            train(
                name,
                seed if given.seed is None else given.seed,
                given.forget if without else (),
                given.into / name,
                given.tower_steps,
                given.steps,
            )


if __name__ == "__main__":
    main()
