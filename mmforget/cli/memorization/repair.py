"""`mmforget memorization repair`: fine-tune a pipeline so that it no longer holds the pictures."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.memorization import common
from mmforget.cli.memorization.attack import original_of
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
from mmforget.errors import ConfigurationError, MissingFileError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import Tensor

    from mmforget.data.memorized import MemorizedSet
    from mmforget.metrics.copying import CopySimilarity
    from mmforget.models.diffusion import DiffusionGenerator
    from mmforget.models.weight_mask import WeightMask

HELP = f"""
usage: mmforget memorization repair PIPELINE [--memorized SET] [options]

Fine-tunes the denoiser on ordinary pictures and, depending on the method, on other pictures for
the memorized prompts and for embeddings that an attack finds. Leaves a run folder with the
pipeline in the format of diffusers, the results and the report.

  PIPELINE              a diffusers folder, a hub id, planted, planted_transformer, or the run
                        folder of `prune`
  --against ORIGINAL    what the result is compared with (default: PIPELINE, or what its run
                        started from)
{MEMORIES_HELP}
how:
  --method METHOD       adversarial, siss, retain, perp, or module.Class (default: adversarial)
  --steps N             optimizer steps (default: 500)
  --set NAME=VALUE      a setting of the method, such as lr=1e-4
  --mask FILE           a mask of `prune`: perp keeps its weights at zero, the others take pictures
                        of the pruned pipeline as what the prompts should show (default: that of
                        the run, else ordinary pictures)
  --attack              attack the repaired and the original pipeline; without it no memory is
                        called removed
{CHECK_HELP}{RUN_HELP}{REPORT_HELP}
examples:
  mmforget memorization repair planted --set lr=5e-4 --set batch_size=24 \\
      --set retain_batch_size=16 --attack
  mmforget memorization repair runs/nemo-forget-6-memorized-prompts --method perp
  mmforget memorization repair sd15/ --memorized prompts.csv --images pictures --retain laion \\
      --test coco --controls unseen --similarity sscd.safetensors --steps 2000 --attack
"""

REPAIRS = {
    "adversarial": "mmforget.methods.adversarial_fine_tuning:AdversarialFineTuning",
    "siss": "mmforget.methods.siss:SISS",
    "retain": "mmforget.methods.retain_fine_tuning:RetainFineTuning",
    "perp": "mmforget.methods.perp:PERP",
}
STEPS = 500


def run(args: list[str]) -> int:
    """Repair.

    Raises:
        MMForgetError: the settings are wrong, or something cannot be loaded.
    """
    parser = common.parser_of("repair")
    common.add_memories(parser)
    common.add_checks(parser)
    parser.add_argument("--method", default="adversarial")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--set", action="append", default=[])
    for name in ("against", "mask"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--attack", action="store_true")
    given = common.parsed(parser, args)
    common.inherit(given, common.INHERITED)
    settings = settings_of(given.set)
    requirements = common.requirements_of(given, given.attack)
    if given.method not in REPAIRS and "." not in given.method:
        raise ConfigurationError(
            f"`--method` is '{given.method}', {suggest(given.method, REPAIRS)}"
        )
    if given.steps < 1:
        raise ConfigurationError(f"`--steps` is {given.steps}, it must be at least 1")
    given.mask = mask_of(given)
    given.against = original_of(given) or given.pipeline
    given.memorized = common.memorized_name(given)
    return _run(given, settings, requirements)


def mask_of(given: Namespace) -> str | None:
    """The mask that was given, or that of the run.

    Raises:
        ConfigurationError: PERP without a mask.
        MissingFileError: there is no such file.
    """
    from mmforget.cli.memorization.prune import MASK_NAME

    if given.mask:
        if not Path(given.mask).exists():
            raise MissingFileError(f"`--mask` is '{given.mask}', but there is no such file")
        return str(given.mask)
    own = Path(given.pipeline) / "artifact" / MASK_NAME
    if own.is_file():
        return str(own)
    if given.method == "perp":
        raise ConfigurationError(
            "`--method perp` repairs after pruning and needs `--mask`; "
            "`mmforget memorization prune` makes one"
        )
    return None


def _run(given: Namespace, settings: dict[str, Any], requirements: list[Any]) -> int:
    from mmforget.audit.cost import measured
    from mmforget.audit.memorization import audit_memorization
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.erase import GIVEN, run_method
    from mmforget.method_names import check_settings
    from mmforget.models.base import state_hash
    from mmforget.models.weight_mask import WeightMask

    wanted = common.audit_settings(given, given.attack)
    cls = common.find_class(given.method, REPAIRS, "--method")
    check_settings(cls, settings, GIVEN)
    mask = WeightMask.load(given.mask) if given.mask else None
    similarity = common.load_similarity_of(given)
    original = common.load_model(given, given.against)
    base = original
    if common.artifact_of(given.pipeline) != common.artifact_of(given.against):
        base = common.load_model(given)
    original.require_full_precision("the audit")
    memorized = common.load_memories(given, original)
    located, held_out = memorized.split(given.share, given.seed)
    clip = common.load_clip_of(given, original)
    if not given.quiet:
        print(f"{cls.__name__} on {given.pipeline}, {given.steps} steps", file=sys.stderr)
    default = f"runs/{given.method.rpartition('.')[2]}-{located.request.name}"
    with common.started(given, default) as (folder, stages, config):
        further = _inputs(cls, settings, original, located, mask, similarity, given, stages)
        with measured() as cost:
            method = cls(base, located, copy=True, seed=given.seed, **further, **settings)
            repaired = run_method(
                method, given.steps, not given.quiet, checkpoints=stages.file("checkpoints")
            )
        spent = cost.to_dict() | {"sample_passes": method.cost()["sample_passes"]}
        reads = {"forget_inputs": bool(getattr(cls, "reads_pictures", False))}
        entry = ModelEntry(
            "repaired", "unlearned", source="this run", method=cls.__name__,
            access=cls.access.to_dict() | reads, cost=spent, details=method.statistics(),
        )  # fmt: skip
        base_hash = state_hash(original)
        results = audit_memorization(
            AuditedModel(ModelEntry("original", "original", base_hash, given.against), original),
            AuditedModel(entry, repaired),
            located,
            similarity,
            held_out,
            wanted,
            clip=clip,
            title=given.title or "",
            progress=not given.quiet,
            command="mmforget memorization repair",
            remember=stages.remember,
        )
        missed = check(results, requirements)
        stages.remove()
        save(
            folder, given, config, cls.__name__, settings | {"steps": given.steps}, repaired,
            located, results, base_hash, adapter=method.save_adapter,
        )  # fmt: skip
    return common.show(given, folder, results, missed)


def _inputs(
    cls: Any,
    settings: Mapping[str, Any],
    original: DiffusionGenerator,
    located: MemorizedSet,
    mask: WeightMask | None,
    similarity: CopySimilarity,
    given: Namespace,
    stages: Stages,
) -> dict[str, Any]:
    """What the method takes besides its settings: a mask, or pictures for the memorized prompts."""
    known = inspect.signature(cls).parameters
    if mask is None:
        return {}
    if "mask" in known:
        return {"mask": mask}
    if "surrogates" not in known or settings.get("towards", "surrogates") != "surrogates":
        return {}
    found: dict[str, Any] = {
        "surrogates": surrogates(original, located, mask, similarity, given.seed, stages)
    }
    if "towards" in known and "towards" not in settings:
        found["towards"] = "surrogates"
    return found


def surrogates(
    original: DiffusionGenerator,
    located: MemorizedSet,
    mask: WeightMask,
    similarity: CopySimilarity,
    seed: int,
    stages: Stages,
) -> Mapping[str, Tensor]:
    """Pictures of the pruned pipeline that are no copies, read back if they were made before."""
    from safetensors.torch import load_file, save_file

    from mmforget.cli.memorization.prune import applied
    from mmforget.methods.surrogates import make_surrogates

    file = stages.file("surrogates.safetensors")
    if not file.is_file():
        made = make_surrogates(applied(mask, original), located, similarity, seed=seed)
        fresh = file.with_suffix(".saving")
        save_file({name: images.contiguous() for name, images in made.items()}, fresh)
        fresh.replace(file)
    found: dict[str, Tensor] = load_file(file)
    return found
