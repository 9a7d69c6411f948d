"""`mmforget memorization prune`: take the weights that memorized prompts use out of a pipeline."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.memorization import common
from mmforget.cli.memorization.common import (
    CHECK_HELP,
    MEMORIES_HELP,
    REPORT_HELP,
    RUN_HELP,
    Stages,
)
from mmforget.cli.memorization.saving import save
from mmforget.cli.pipelines import settings_of
from mmforget.cli.requirements import check
from mmforget.errors import ConfigurationError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.audit.scene import AuditedModel
    from mmforget.data.memorized import MemorizedSet
    from mmforget.models.diffusion import DiffusionGenerator
    from mmforget.models.weight_mask import WeightMask

HELP = f"""
usage: mmforget memorization prune PIPELINE [--memorized SET] [options]

Locates weights that memorized prompts use more than others, sets them to zero, and compares with
masks of the same size that locate nothing. Leaves a run folder with the pipeline in the format of
diffusers, the mask, the results and the report.

  PIPELINE              a diffusers folder, a hub id, planted or planted_transformer
{MEMORIES_HELP}
how:
  --method METHOD       subspace, neuron-ratio, nemo, or module.Class (default: subspace)
  --set NAME=VALUE      a setting of the method, such as ratio=0.05
  --control NAME        a mask of the same size for comparison: random, magnitude, base-only, none
                        (default: random and magnitude)
  --attack              attack the pruned and the original pipeline; without it no memory is
                        called removed
{CHECK_HELP}{RUN_HELP}{REPORT_HELP}
examples:
  mmforget memorization prune planted --method nemo --attack
  mmforget memorization prune planted --set ratio=0.05 --require 'copies<=0.1'
  mmforget memorization prune sd15/ --memorized prompts.csv --images pictures --test coco \\
      --controls unseen --similarity sscd.safetensors --share 0.1
"""

LOCATORS = {
    "subspace": "mmforget.methods.subspace_pruning:SubspacePruning",
    "neuron-ratio": "mmforget.methods.neuron_ratio_pruning:NeuronRatioPruning",
    "nemo": "mmforget.methods.nemo:NeMo",
}
CONTROLS = {
    "random": "mmforget.methods.pruning_controls:RandomPruning",
    "magnitude": "mmforget.methods.pruning_controls:MagnitudePruning",
    "base-only": "mmforget.methods.pruning_controls:BaseOnlyPruning",
}
MASK_NAME = "mmforget_mask.safetensors"


def run(args: list[str]) -> int:
    """Prune.

    Raises:
        MMForgetError: the settings are wrong, or something cannot be loaded.
    """
    parser = common.parser_of("prune")
    common.add_memories(parser)
    common.add_checks(parser)
    parser.add_argument("--method", default="subspace")
    for name in ("set", "control"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--attack", action="store_true")
    given = common.parsed(parser, args)
    settings = settings_of(given.set)
    requirements = common.requirements_of(given, given.attack)
    controls = controls_of(given.control)
    if given.method not in LOCATORS and "." not in given.method:
        raise ConfigurationError(
            f"`--method` is '{given.method}', {suggest(given.method, LOCATORS)}"
        )
    given.memorized = common.memorized_name(given)
    return _run(given, settings, controls, requirements)


def controls_of(names: Sequence[str]) -> tuple[str, ...]:
    """The masks to compare with.

    Raises:
        ConfigurationError: an unknown name, or ``none`` beside others.
    """
    if not names:
        return ("random", "magnitude")
    for name in names:
        if name not in CONTROLS and name != "none":
            raise ConfigurationError(
                f"`--control` is '{name}', {suggest(name, [*CONTROLS, 'none'])}"
            )
    if "none" in names and len(names) > 1:
        raise ConfigurationError("`--control none` stands beside others; leave one of them out")
    return () if "none" in names else tuple(dict.fromkeys(names))


def _run(
    given: Namespace, settings: dict[str, Any], controls: tuple[str, ...], requirements: list[Any]
) -> int:
    from mmforget.audit.memorization import audit_memorization
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.erase import GIVEN
    from mmforget.method_names import check_settings
    from mmforget.models.base import state_hash

    wanted = common.audit_settings(given, given.attack)
    cls = common.find_class(given.method, LOCATORS, "--method")
    check_settings(cls, settings, GIVEN)
    similarity = common.load_similarity_of(given)
    original = common.load_model(given)
    original.require_full_precision("the audit")
    memorized = common.load_memories(given, original)
    located, held_out = memorized.split(given.share, given.seed)
    clip = common.load_clip_of(given, original)
    if not given.quiet:
        print(f"{cls.__name__} on {given.pipeline}", file=sys.stderr)
    default = f"runs/{given.method.rpartition('.')[2]}-{located.request.name}"
    with common.started(given, default) as (folder, stages, config):
        base_hash = state_hash(original)
        mask, facts = locate(cls, original, located, settings, given, stages)
        pruned = applied(mask, original)
        entry = ModelEntry(
            "pruned", "unlearned", source="this run", method=cls.__name__,
            access=cls.access.to_dict(), cost=dict(facts["cost"]), details=dict(facts["details"]),
        )  # fmt: skip
        results = audit_memorization(
            AuditedModel(ModelEntry("original", "original", base_hash, given.pipeline), original),
            [AuditedModel(entry, pruned), *_controls(controls, original, located, mask, given)],
            located,
            similarity,
            held_out,
            wanted,
            clip=clip,
            title=given.title or "",
            progress=not given.quiet,
            command="mmforget memorization prune",
            remember=stages.remember,
        )
        missed = check(results, requirements)
        stages.remove()
        save(
            folder, given, config, cls.__name__, settings, pruned, located, results, base_hash,
            adapter=lambda path: _write_mask(mask, original, path),
            beside=lambda path: mask.save(path / MASK_NAME),
        )  # fmt: skip
    return common.show(given, folder, results, missed)


def locate(
    cls: Any,
    original: DiffusionGenerator,
    located: MemorizedSet,
    settings: Mapping[str, Any],
    given: Namespace,
    stages: Stages,
) -> tuple[WeightMask, Mapping[str, Any]]:
    """The mask with what it cost, read back if this run has located it before."""
    from mmforget.audit.cost import measured
    from mmforget.models.weight_mask import WeightMask

    file = stages.file(MASK_NAME)

    def compute() -> dict[str, Any]:
        with measured() as cost:
            method = cls(original, located, copy=False, seed=given.seed, **settings)
            mask = method.locate_mask()
        mask.save(file)
        passes = method.cost()["sample_passes"]
        size = file.stat().st_size
        return {
            "cost": cost.to_dict() | {"sample_passes": passes, "edit_bytes": size},
            "details": method.statistics(),
        }

    facts = stages.remember("located", compute)
    return WeightMask.load(file), facts


def applied(mask: WeightMask, original: DiffusionGenerator) -> DiffusionGenerator:
    """A copy of the model without the weights of the mask."""
    model = copy.deepcopy(original)
    mask.apply(model)
    return model


def _controls(
    names: Sequence[str],
    original: DiffusionGenerator,
    located: MemorizedSet,
    mask: WeightMask,
    given: Namespace,
) -> list[AuditedModel]:
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel

    found = []
    for name in names:
        cls = common.find_class(name, CONTROLS, "--control")
        method = cls(original, located, like=mask, copy=True, seed=given.seed)
        model = method.finalize()
        entry = ModelEntry(
            f"{name} mask", "control", source="as many weights, chosen without the prompts",
            method=cls.__name__, details=method.statistics(),
        )  # fmt: skip
        found.append(AuditedModel(entry, model))
    return found


def _write_mask(mask: WeightMask, original: DiffusionGenerator, folder: Path) -> None:
    mask.save(folder)
    mask.weight_edit(original).save(folder)
