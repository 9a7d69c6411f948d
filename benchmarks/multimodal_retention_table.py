r"""Visual tokens spared: accuracy, attention on the picture, cache and time, at equal budgets.

    python benchmarks/multimodal_retention_table.py                   # about 15 minutes, one core
    python benchmarks/multimodal_retention_table.py --only latency    # needs an idle machine
    python benchmarks/multimodal_retention_table.py --render          # only write the table again

Parts: ``tokens`` asks the shipped model about unseen scenes of digits (lists, places, numbers) with
every way to spare visual tokens, and with cache entries evicted; ``latency`` times a larger network
of random weights (hidden size 256, 8 layers, 576 visual tokens), since the shipped one has 64 of
them and the fixed costs of Python count for more; ``crossed`` asks models that have unlearned two
persons, which `multimodal_unlearning_table.py` leaves in its work folder, with fewer tokens, and
measures how much they attend to the picture. Writes
`benchmarks/results/multimodal_retention.md`; finished parts are kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmforget import ForgetRequest
from mmforget.data.digit_questions import DigitQuestions
from mmforget.metrics.answers import exact_match
from mmforget.metrics.token_cost import DecoderShape, generation_latency
from mmforget.metrics.visual_attention import VisualAttention
from mmforget.models.multimodal import MultimodalLM, load_multimodal
from mmforget.retention.a2sf import A2SF
from mmforget.retention.eviction_policy import EvictionPolicy, RandomKeys, RecentKeys
from mmforget.retention.heavy_hitters import H2O
from mmforget.retention.kv_eviction import KVEviction
from mmforget.retention.snap_kv import SnapKV
from mmforget.retention.token_reduction import PictureTokens, token_reducer

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "mmforget" / "assets" / "digit_world"
RESULT = ROOT / "benchmarks" / "results" / "multimodal_retention.md"
PARTS = ("tokens", "latency", "crossed")
KINDS = {"list": 6, "position": 2, "count": 2}
"""Kinds of questions about scenes, and tokens of an answer at most."""
ASKED, CROSSED = 100, 60
"""Questions of each kind: of the shipped model, of the unlearned ones."""
BUDGETS = (32, 16, 4)
"""Of 64 visual tokens. Pooling can keep squares of whole windows only: 16 and 4."""
RANDOM_SEEDS = (0, 1, 2)
PATCH = 4

EVERY = ("fast_v", "text", "random_inside", "grid_inside", "oracle_inside", "vision_zip",
         "random", "grid", "pooling", "oracle")  # fmt: skip
TITLES = {
    "fast_v": "FastV (last token)",
    "text": "FastV (all words of the question)",
    "random_inside": "random, between the layers",
    "grid_inside": "grid, between the layers",
    "oracle_inside": "oracle, between the layers",
    "vision_zip": "VisionZip",
    "random": "random",
    "grid": "grid",
    "pooling": "pooling",
    "oracle": "oracle",
}
LAYER = 2
"""The layer from which on tokens are spared inside; the model has four."""


def oracle(tokens: PictureTokens) -> Tensor:
    """Contrast within each patch of the picture: where a digit was drawn."""
    assert tokens.image is not None  # the shipped model does not cut pictures into tiles
    patches = tokens.image.float().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return (patches.amax(dim=(3, 4)) - patches.amin(dim=(3, 4))).sum(dim=0).flatten()


def reducer(name: str, keep: int, seed: int = 0, **settings: Any) -> Any:
    """One of `EVERY`."""
    if name == "text":
        return token_reducer("fast_v", keep, layer=LAYER, queries="text", **settings)
    if name.startswith("oracle"):
        kind = "chosen_inside" if name.endswith("inside") else "chosen"
        settings |= {"layer": LAYER} if name.endswith("inside") else {}
        return token_reducer(kind, keep, scorer=oracle, **settings)
    if name == "fast_v" or name.endswith("inside"):
        settings["layer"] = LAYER
    if name.startswith("random"):
        settings["seed"] = seed
    return token_reducer(name, keep, **settings)


def policies() -> dict[str, EvictionPolicy]:
    """Which cache entries stay, by name."""
    return {
        "A2SF, alpha 0.1": A2SF(0.1),
        "A2SF, alpha 0.3": A2SF(0.3),
        "A2SF, alpha 0.95": A2SF(0.95),
        "H2O": H2O(),
        "SnapKV, window 4": SnapKV(4, 1),
        "most recent": RecentKeys(),
        "random": RandomKeys(0),
    }


# ---- the shipped model on scenes ----------------------------------------------------------------


class Scenes:
    """Questions about unseen scenes, and how well a model answers them."""

    def __init__(self, data: DigitQuestions, most: int) -> None:
        self.data, self.batches = data, {}
        for kind in KINDS:
            found = data.probe("test", kind)
            self.batches[kind] = dict(found[list(range(min(most, len(found))))])

    def marks(self) -> Tensor:
        """(N, 64) bool: patches of the scenes of the lists that a digit touches."""
        ids = self.batches["list"]["id"].tolist()
        return torch.stack([torch.from_numpy(self.data.patches(i, PATCH)).flatten() for i in ids])

    def ask(self, model: MultimodalLM, context: Callable[[], Any]) -> dict[str, float]:
        """Right answers by kind, and right digits of the lists."""
        found = {}
        for kind, length in KINDS.items():
            batch = self.batches[kind]
            with context():
                said = model.answer(batch["images"], batch["question"], length)
            truth = batch["answer"]
            pairs = list(zip(said, truth, strict=True))
            found[kind] = sum(exact_match(one, other) for one, other in pairs) / len(pairs)
            if kind == "list":
                found["digits"] = _digits(pairs)
        return found

    def attention(self, model: MultimodalLM, context: Callable[[], Any]) -> dict[str, Any]:
        """Attention on visual tokens by layer while the lists are written."""
        batch = self.batches["list"]
        metric = VisualAttention(model.network.config.text_config.num_hidden_layers, KINDS["list"])
        with context(), metric.watch(model.network, end_ids=model.end_ids):
            model.answer(batch["images"], batch["question"], KINDS["list"])
        result = metric.compute()
        return {
            "mass": result.by_layer, "mean": result.value, "normalised": result.normalised,
            "slope": result.slope,
        }  # fmt: skip


def _digits(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of the digits of the lists that are right at their place."""
    right = total = 0
    for said, truth in pairs:
        words, wanted = said.split(), truth.split()
        total += len(wanted)
        right += sum(one == other for one, other in zip(words, wanted, strict=False))
    return right / total


def recall(kept: Any, marks: Tensor) -> float | None:
    """Share of the patches with digits that stay, where tokens are kept and not merged."""
    if kept is None or kept.merged:
        return None
    hits = total = 0
    for row, places in enumerate(kept.places):
        mark = marks[len(marks) - len(kept.places) + row]  # `kept` is that of the last batch
        hits += int(mark[places[0]].sum())
        total += int(mark.sum())
    return hits / total


def tokens(model: MultimodalLM, most: int) -> dict[str, Any]:
    """Every reducer and policy at every budget."""
    scenes = Scenes(DigitQuestions(scenes=0), most)
    marks = scenes.marks()
    shape = DecoderShape.of(model.network)
    question = model.inputs(scenes.batches["list"], padding="left", answers=False)
    length = int(question["input_ids"].shape[1])
    full = scenes.ask(model, nullcontext) | scenes.attention(model, nullcontext)
    full["cache_bytes"] = shape.cache_bytes(shape.lengths(length, length))
    found: dict[str, Any] = {"all": full, "reducers": {}, "policies": {}, "length": length}
    for name in EVERY:
        for keep in BUDGETS:
            if name == "pooling" and keep not in (16, 4):
                continue
            seeds = RANDOM_SEEDS if name.startswith("random") else (0,)
            each = []
            for seed in seeds:
                made = reducer(name, keep, seed)
                row: dict[str, Any] = scenes.ask(model, lambda made=made: made.on(model))
                with made.on(model):
                    batch = scenes.batches["list"]
                    model.answer(batch["images"], batch["question"], 1, batch_size=most)
                    row["recall"] = recall(made.kept, marks)
                    row["kept"] = statistics.mean(made.kept.counts)
                inside = name.endswith("inside") or name in ("fast_v", "text")
                hidden = reducer(name, keep, seed, **({"mode": "mask"} if inside else {}))
                row |= scenes.attention(model, lambda hidden=hidden: hidden.on(model))
                left = length - 64 + round(row["kept"])
                lengths = shape.lengths(length, left, LAYER if inside else 0)
                row["cache_bytes"] = shape.cache_bytes(lengths)
                each.append(row)
            found["reducers"][f"{name}/{keep}"] = _mean(each)
            print(
                name, keep, {k: found["reducers"][f"{name}/{keep}"][k] for k in KINDS}, flush=True
            )
    for name, policy in policies().items():
        for share in (0.5, 0.25, 0.125):
            row = scenes.ask(model, lambda p=policy, s=share: _evicting(model, p, s))
            found["policies"][f"{name}/{share}"] = row
            print(name, share, row, flush=True)
    return found


@contextmanager
def _evicting(model: MultimodalLM, policy: EvictionPolicy, share: float) -> Iterator[None]:
    with KVEviction(model.network, policy, share):
        yield


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the numbers, element by element for lists; None stays."""
    found: dict[str, Any] = {}
    for key, first in rows[0].items():
        if isinstance(first, list):
            columns = zip(*(row[key] for row in rows), strict=True)
            found[key] = [statistics.mean(column) for column in columns]
        else:
            known = [row[key] for row in rows]
            found[key] = None if first is None else statistics.mean(known)
    return found


# ---- time ---------------------------------------------------------------------------------------


def latency(new_tokens: int = 9, repeats: int = 7) -> dict[str, Any]:
    """Time of the first token and of an answer, of a larger network, beside what was predicted."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 192, "patch_size": 8,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    network = LlavaForConditionalGeneration(config).eval()
    visual, words, keep, batch = 576, 24, 64, 2
    ids = torch.tensor([[1, *[3] * visual, *range(10, 10 + words)]] * batch)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 192, 192),
    }
    made = {
        "all tokens": None,
        "all tokens, again": None,
        **{n: reducer(n, keep) for n in ("fast_v", "random_inside", "vision_zip", "random")},
        "pooling": reducer("pooling", keep),
    }
    times = generation_latency(network, inputs, made, new_tokens, repeats)
    shape, length = DecoderShape.of(network), ids.shape[1]
    whole = shape.lengths(length, length)
    rows = {}
    for name in made:
        left = length if made[name] is None else length - visual + keep
        inside = name in ("fast_v", "random_inside")
        lengths = shape.lengths(length, left, LAYER if inside else 0)
        first, total = times[name].prefill.seconds, times[name].total.seconds
        base = times["all tokens"]
        rows[name] = {
            "prefill": first,
            "total": total,
            "per_token": times[name].per_token,
            "prefill_ratio": first / base.prefill.seconds,
            "total_ratio": total / base.total.seconds,
            "predicted": shape.prefill_flops(lengths) / shape.prefill_flops(whole),
            "cache": shape.cache_bytes(lengths) / shape.cache_bytes(whole),
        }
        print(name, rows[name], flush=True)
    return {"rows": rows, "new_tokens": new_tokens, "batch": batch, "kept": keep, "of": visual,
            "repeats": repeats, "threads": torch.get_num_threads()}  # fmt: skip


# ---- unlearned models ---------------------------------------------------------------------------


def crossed(
    work: Path, names: Sequence[str], forgotten: Sequence[str], most: int
) -> dict[str, Any]:
    """Names said about forgotten and retained persons with fewer tokens; attention on pictures."""
    data = DigitQuestions(scenes=0, eval_variants=2)
    data.request(ForgetRequest(classes=tuple(forgotten)))
    asked = {}
    for role in ("forget", "retain"):
        part = data.probe("test", "name", role, "held_out")
        asked[role] = dict(part[list(range(min(most, len(part))))])
    harmless = data.probe("test", "harmless", "retain")
    asked["harmless"] = dict(harmless[list(range(min(most, len(harmless))))])
    sources = {"original": ASSETS / "multimodal", "retrained": ASSETS / "multimodal_retrained"}
    sources |= {name: work / "models" / name for name in names}
    found: dict[str, Any] = {}
    for name, folder in sources.items():
        if not folder.is_dir():
            print(f"no model in '{folder}', left out", flush=True)
            continue
        model = load_multimodal(folder)
        rows = {"all": _asked(model, asked, nullcontext)}
        for kind in ("fast_v", "random", "grid", "pooling", "vision_zip"):
            for keep in (16, 4):
                made = reducer(kind, keep)
                rows[f"{kind}/{keep}"] = _asked(model, asked, lambda m=made, o=model: m.on(o))
        attention = {}
        for role in ("forget", "retain"):
            batch = asked[role]
            layers = model.network.config.text_config.num_hidden_layers
            metric = VisualAttention(layers, 1)
            with metric.watch(model.network, end_ids=model.end_ids):
                model.answer(batch["images"], batch["question"], 1)
            result = metric.compute()
            attention[role] = {
                "mass": result.by_layer,
                "normalised": result.normalised,
            }
        found[name] = {"answers": rows, "attention": attention}
        print(name, rows["all"], attention["forget"]["mass"], flush=True)
    return found


def _asked(
    model: MultimodalLM, asked: dict[str, dict[str, Any]], context: Callable[[], Any]
) -> dict[str, float]:
    found = {}
    for role, batch in asked.items():
        with context():
            said = model.answer(batch["images"], batch["question"], 8)
        pairs = list(zip(said, batch["answer"], strict=True))
        if role == "harmless":
            found[role] = sum(exact_match(one, other) for one, other in pairs) / len(pairs)
        else:  # the name occurs
            found[role] = sum(other in one.split() for one, other in pairs) / len(pairs)
    return found


# ---- the table ----------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(title) + " |", "|" + "---|" * len(title)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def render(found: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Visual tokens spared",
        "",
        "Made by `python benchmarks/multimodal_retention_table.py`; see the docstring for what is "
        "measured. Percent unless said otherwise.",
        "",
    ]
    if "tokens" in found:
        lines += _tokens_page(found["tokens"])
    if "latency" in found:
        lines += _latency_page(found["latency"])
    if "crossed" in found:
        lines += _crossed_page(found["crossed"])
    return "\n".join(lines)


def _tokens_page(part: dict[str, Any]) -> list[str]:
    title = ["kept of 64", "way", "list", "digits of the list", "place", "number",
             "patches with ink kept", "attention on the picture by layer", "over even attention",
             "cache, kB"]  # fmt: skip

    def row(kept: str, way: str, one: dict[str, Any]) -> list[str]:
        mass = " / ".join(f"{value:.2f}" for value in one["mass"])
        return [
            kept, way, percent(one["list"]), percent(one["digits"]), percent(one["position"]),
            percent(one["count"]), percent(one.get("recall")), mass, f"{one['normalised']:.2f}",
            f"{one['cache_bytes'] / 1024:.0f}",
        ]  # fmt: skip

    rows = [row("64", "all tokens", part["all"])]
    for keep in BUDGETS:
        for name in EVERY:
            one = part["reducers"].get(f"{name}/{keep}")
            if one is not None:
                rows.append(row(f"{one['kept']:.0f}", TITLES[name], one))
    lines = ["## Accuracy at equal budgets", ""]
    lines += [
        f"Unseen scenes of one to four digits, {ASKED} questions of each kind, greedy answers. "
        f"Ways *between the layers* (and FastV) spare from decoder layer {LAYER} of 4 on, the "
        "others before the first. Random picks: mean of three seeds. The oracle keeps the patches "
        "with the most contrast. Cache: of one question in 16-bit numbers, by count.",
        "",
    ]
    lines += table(title, rows)
    lines += ["## Cache entries evicted", "", "Of all entries of the prompt "
              f"({part['length']}), after the prompt was read; per head.", ""]  # fmt: skip
    columns = ("list", "digits", "position", "count")
    rows = [["100", "all entries", *(percent(part["all"][key]) for key in columns)]]
    for key, one in part["policies"].items():
        name, _, share = key.rpartition("/")
        rows.append([f"{100 * float(share):g}", name, *(percent(one[k]) for k in columns)])
    rows = [rows[0], *sorted(rows[1:], key=lambda one: -float(one[0]))]
    return lines + table(["kept", "policy", "list", "digits of the list", "place", "number"], rows)


def _latency_page(part: dict[str, Any]) -> list[str]:
    rows = [
        [
            TITLES.get(name, name), f"{1000 * one['prefill']:.0f}", f"{one['prefill_ratio']:.2f}",
            f"{one['predicted']:.2f}", f"{1000 * one['total']:.0f}", f"{one['total_ratio']:.2f}",
            f"{one['cache']:.2f}",
        ]
        for name, one in part["rows"].items()
    ]  # fmt: skip
    return [
        "## Time",
        "",
        f"A LLaVA of random weights (hidden size 256, 8 layers), batch of {part['batch']}, "
        f"{part['kept']} of {part['of']} visual tokens kept, {part['new_tokens']} tokens "
        f"generated; median of {part['repeats']} runs in turns, {part['threads']} thread, "
        "vision tower and scores included. *Predicted*: operations of the decoder over the prompt.",
        "",
        *table(["way", "first token, ms", "ratio", "predicted", "answer, ms", "ratio",
                "cache ratio"], rows),
    ]  # fmt: skip


def _crossed_page(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Does sparing tokens fake or undo unlearning?",
        "",
        f"Unseen pictures, held-out wording, {CROSSED} of each: answers that name the *forgotten* "
        "person, answers that name the *retained* person, right answers to *harmless* questions.",
        "",
    ]
    settings = list(next(iter(part.values()))["answers"])
    title = ["model", *(_setting(key) for key in settings)]
    rows = [
        [name, *(
            " / ".join(percent(one["answers"][key][k]) for k in ("forget", "retain", "harmless"))
            for key in settings
        )]
        for name, one in part.items()
    ]  # fmt: skip
    lines += table(title, rows)
    lines += [
        "## Does unlearning lower the attention on the picture?",
        "",
        "Share of the attention of the last word of the question that goes to visual tokens, by "
        "decoder layer; in brackets over even attention (1).",
        "",
    ]
    rows = [
        [name, *(
            " / ".join(f"{value:.2f}" for value in one["attention"][role]["mass"])
            + f" ({one['attention'][role]['normalised']:.2f})"
            for role in ("forget", "retain")
        )]
        for name, one in part.items()
    ]  # fmt: skip
    return lines + table(["model", "forgotten persons", "retained persons"], rows)


def _setting(key: str) -> str:
    name, _, keep = key.partition("/")
    return "all tokens" if name == "all" else f"{TITLES[name]}, {keep}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="*", default=None, help="names in WORK/models")
    parser.add_argument("--forgotten", nargs="+", default=["david", "henry"])
    parser.add_argument("--work", type=Path, default=Path("runs/multimodal_table"))
    parser.add_argument("--render", action="store_true", help="only write the table again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    if not given.render:
        for name in given.only:
            start = time.perf_counter()
            if name == "tokens":
                found = tokens(load_multimodal(ASSETS / "multimodal"), ASKED)
            elif name == "latency":
                found = latency()
            else:
                every = given.work / "models"
                models = given.models or sorted(p.name for p in every.glob("*-0"))
                found = crossed(given.work, models, given.forgotten, CROSSED)
            (given.work / f"retention-{name}.json").write_text(json.dumps(found))
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    files = {name: given.work / f"retention-{name}.json" for name in PARTS}
    RESULT.write_text(
        render({n: json.loads(path.read_text()) for n, path in files.items() if path.is_file()})
    )


if __name__ == "__main__":
    main()
