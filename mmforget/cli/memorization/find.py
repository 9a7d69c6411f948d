"""`mmforget memorization find`: which prompts are memorized, from the model alone."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.memorization import common
from mmforget.cli.memorization.common import RUN_HELP, Stages
from mmforget.cli.pipelines import PLANTED, settings_of
from mmforget.errors import ConfigurationError, MissingFileError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.models.diffusion import DiffusionGenerator

HELP = f"""
usage: mmforget memorization find PIPELINE --prompts SET [--ordinary SET] [options]

Scores prompts by how memorized they look. It needs no training pictures, but ordinary prompts to
compare with. Leaves a run folder with scores.csv, and found.csv, which `prune`, `attack` and
`repair` take as `--memorized`.

what:
  PIPELINE              a diffusers folder, a hub id, planted or planted_transformer
  --prompts SET         prompts to score: a list (.csv .tsv .json .jsonl .txt), a folder, or planted
                        (default: planted for the shipped pipelines)
  --ordinary SET        prompts that are certainly not memorized (default: those of planted)

how:
  --detector NAME       noise_magnitude, attention_entropy, sharpness (default: noise_magnitude)
  --set NAME=VALUE      a setting of it, such as n=8 or steps=1
  --quantile SHARE      a prompt is called memorized above the scores of this share of the ordinary
                        ones (default: 0.99)
  --tokens N            for the N prompts that look most memorized, the words that matter
                        (default: 0)
  --sampling-steps N    steps of the sampler (default: 20)
  --guidance SCALE      guidance of the sampler (default: 3 for shipped pipelines, else 7.5)
{RUN_HELP}
examples:
  mmforget memorization find planted --tokens 3
  mmforget memorization find sd15/ --prompts captions.txt --ordinary coco.txt --set n=4
"""

DETECTORS = {
    "noise_magnitude": "mmforget.detection.noise_magnitude:noise_magnitude",
    "attention_entropy": "mmforget.detection.attention_entropy:attention_entropy",
    "sharpness": "mmforget.detection.sharpness:sharpness",
}
AT_ONCE = 16
"""Prompts that are scored before what was found is written down."""


def run(args: list[str]) -> int:
    """Find.

    Raises:
        MMForgetError: the settings are wrong, or something cannot be loaded.
    """
    parser = common.parser_of("find")
    for name in ("prompts", "ordinary"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--detector", default="noise_magnitude")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--quantile", type=float, default=0.99)
    parser.add_argument("--tokens", type=int, default=0)
    given = common.parsed(parser, args)
    settings = settings_of(given.set)
    if given.detector not in DETECTORS:
        raise ConfigurationError(
            f"`--detector` is '{given.detector}', {suggest(given.detector, DETECTORS)}"
        )
    if not 0 < given.quantile < 1:
        raise ConfigurationError(f"`--quantile` is {given.quantile}, it must lie between 0 and 1")
    if given.tokens < 0:
        raise ConfigurationError(f"`--tokens` is {given.tokens}, it must be at least 0")
    for name in ("prompts", "ordinary"):
        if not getattr(given, name) and given.pipeline in PLANTED:
            setattr(given, name, "planted")
        value = getattr(given, name)
        if not value:
            raise ConfigurationError(
                f"`--{name}` is missing: give a list of prompts, one per line, or a table"
            )
        if value != "planted" and not Path(value).expanduser().exists():
            raise MissingFileError(f"`--{name}` is '{value}', but there is no such file or folder")
    return _run(given, settings)


def _run(given: Namespace, settings: dict[str, Any]) -> int:
    from mmforget.artifacts.run_folder import atomic_write

    module, _, function = DETECTORS[given.detector].partition(":")
    detector = getattr(importlib.import_module(module), function)
    model = common.load_model(given)
    prompts, ordinary = prompts_of(given.prompts), ordinary_of(given.ordinary)
    known = set(prompts)
    ordinary = [text for text in ordinary if text not in known]
    if not ordinary:
        raise ConfigurationError(
            "`--ordinary` holds no prompt that is not also in `--prompts`; give others"
        )
    with common.started(given, f"runs/find-{given.detector}") as (folder, stages, config):
        reports = list(scored(detector, model, [*prompts, *ordinary], given, settings, stages))
        scores = {text: score for part in reports for text, score in part["scores"].items()}
        higher = bool(reports[0]["higher_is_memorized"])
        limit = threshold(sorted(scores[text] for text in ordinary), given.quantile, higher)
        ranked = sorted(prompts, key=lambda text: scores[text], reverse=higher)
        found = [text for text in ranked if (scores[text] > limit) == higher]
        words = {text: attribution(model, text, given, stages) for text in ranked[: given.tokens]}
        summary = {
            "detector": given.detector,
            "protocol": reports[0]["protocol"],
            "higher_is_memorized": higher,
            "threshold": limit,
            "quantile": given.quantile,
            "prompts": len(prompts),
            "ordinary": len(ordinary),
            "found": len(found),
            "queries": sum(part["queries"] for part in reports),
            "seconds": round(sum(part["seconds"] for part in reports), 3),
            "notes": sorted({note for part in reports for note in part["notes"]}),
            "tokens": words,
        }
        stages.remove()
        rows = [[text, scores[text], text in set(found), "candidate"] for text in ranked]
        rows += [[text, scores[text], False, "ordinary"] for text in ordinary]
        head = ["prompt", "score", "memorized", "list"]
        atomic_write(folder.work / "scores.csv", as_csv([head, *rows]))
        listed = [["prompt", "score"], *([text, scores[text]] for text in found)]
        atomic_write(folder.work / "found.csv", as_csv(listed))
        atomic_write(folder.work / "summary.json", json.dumps(summary, indent=1) + "\n")
        atomic_write(folder.work / "config.yaml", as_yaml(config))
        folder.commit()
    print(
        f"{len(found)} of {len(prompts)} prompts look memorized: {given.detector} "
        f"{'above' if higher else 'below'} {limit:.4g}, the {100 * given.quantile:g} % quantile of "
        f"{len(ordinary)} ordinary prompts"
    )
    for text in ranked[:10]:
        print(f"  {scores[text]:8.4g}  {'memorized' if text in found else '         '}  {text}")
        if text in words:
            best = sorted(words[text], key=lambda pair: -pair[1])[:3]
            print("            " + ", ".join(f"{token} {value:.3g}" for token, value in best))
    print(f"scores:   {folder.path / 'scores.csv'}\nfound:    {folder.path / 'found.csv'}")
    return 0


def prompts_of(name: str) -> list[str]:
    """The prompts of a list, each once.

    Raises:
        MMForgetError: see `load_captioned`.
    """
    if name == "planted":
        from mmforget.data.planted import planted

        return [one.prompt for one in planted()]
    return _listed(name)


def ordinary_of(name: str) -> list[str]:
    """The ordinary prompts, each once.

    Raises:
        MMForgetError: see `load_captioned`.
    """
    if name == "planted":
        from mmforget.data.planted import ordinary

        return list(dict.fromkeys(ordinary(256, seed=1)[1]))
    return _listed(name)


def _listed(name: str) -> list[str]:
    from mmforget.data.memorized_files import load_captioned

    return list(dict.fromkeys(load_captioned(name, on_missing="skip").prompts))


def scored(
    detector: Any,
    model: DiffusionGenerator,
    prompts: Sequence[str],
    given: Namespace,
    settings: dict[str, Any],
    stages: Stages,
) -> Iterator[Any]:
    """Reports of a few prompts at a time, each written down; those of an earlier start are read.

    Raises:
        ConfigurationError: a setting that the detector does not have.
        MMForgetError: see the detector.
    """
    import inspect

    from tqdm import tqdm

    known = [
        key for key in inspect.signature(detector).parameters if key not in ("model", "prompts")
    ]
    for key in settings:
        if key not in known:
            raise ConfigurationError(
                f"{given.detector} has no setting '{key}'; {suggest(key, known)}"
            )
    model.check_length(prompts)
    further = {"seed": given.seed} | settings
    with tqdm(total=len(prompts), desc=given.detector, disable=given.quiet, unit="") as bar:
        for start in range(0, len(prompts), AT_ONCE):
            part = list(prompts[start : start + AT_ONCE])

            def score(texts: list[str] = part) -> dict[str, Any]:
                report: dict[str, Any] = detector(model, texts, **further).to_dict()
                return report

            yield stages.remember(f"scores-{start}", score)
            bar.update(len(part))


def attribution(
    model: DiffusionGenerator, prompt: str, given: Namespace, stages: Stages
) -> list[list[Any]]:
    """Words of a prompt with how much they matter, in order."""
    from mmforget.detection.token_attribution import token_attribution

    found = stages.remember(
        f"tokens-{prompt}", lambda: token_attribution(model, prompt, seed=given.seed).to_dict()
    )
    return [[one["text"], one["value"]] for one in found["tokens"]]


def threshold(ordered: Sequence[float], quantile: float, higher: bool) -> float:
    """The score that this share of the ordinary prompts does not reach.

    Args:
        ordered: their scores, the smallest first.
        quantile: the share.
        higher: whether high scores mean memorized.
    """
    place = min(len(ordered) - 1, int(quantile * len(ordered)))
    return ordered[place] if higher else ordered[len(ordered) - 1 - place]


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """A table as text."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def as_yaml(config: dict[str, Any]) -> str:
    """A configuration as text."""
    import yaml

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
