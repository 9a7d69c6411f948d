"""`mmforget memorization attack`: is a memory gone, or only out of reach of its prompt?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.memorization import common
from mmforget.cli.memorization.common import CHECK_HELP, MEMORIES_HELP, REPORT_HELP, RUN_HELP
from mmforget.cli.requirements import check
from mmforget.cli.run_files import finish
from mmforget.errors import ConfigurationError, MissingFileError

if TYPE_CHECKING:
    from argparse import Namespace

HELP = f"""
usage: mmforget memorization attack PIPELINE [--against ORIGINAL] [options]

Searches, for every memorized picture, for a prompt embedding under which the pipeline draws it
again, and does the same with pictures that nobody was trained on and with the original pipeline.
Only what comes back while the never-trained pictures stay hidden counts. Changes nothing.

  PIPELINE              a pipeline that was treated, or the run folder of `prune` or `repair`
  --against ORIGINAL    the pipeline before (default: that of the run)
{MEMORIES_HELP}{CHECK_HELP}{RUN_HELP}{REPORT_HELP}
examples:
  mmforget memorization attack runs/nemo-forget-6-memorized-prompts
  mmforget memorization attack pruned/ --against sd15/ --memorized prompts.csv --images pictures \\
      --test coco --controls unseen --similarity sscd.safetensors
  mmforget memorization attack runs/repaired --attack-steps 0 --attack-steps 200 \\
      --require 'attack<=0.1'
"""


def run(args: list[str]) -> int:
    """Attack.

    Raises:
        MMForgetError: the settings are wrong, or something cannot be loaded.
    """
    parser = common.parser_of("attack")
    parser.add_argument("--against")
    common.add_memories(parser)
    common.add_checks(parser)
    given = common.parsed(parser, args)
    common.inherit(given, common.INHERITED)
    given.against = original_of(given)
    if not given.against:
        raise ConfigurationError(
            "`mmforget memorization attack` needs `--against`, the pipeline before: an attack "
            "proves nothing that was not shown to work there"
        )
    requirements = common.requirements_of(given, True)
    given.memorized = common.memorized_name(given)
    return _run(given, requirements)


def original_of(given: Namespace) -> str | None:
    """The pipeline before: what was given, or what the run of PIPELINE started from.

    Raises:
        MissingFileError: an artifact without manifest.
    """
    if given.against:
        return str(given.against)
    folder = Path(given.pipeline)
    for inside in (folder / "artifact", folder):
        if (inside / "manifest.json").is_file():
            from mmforget.artifacts.manifest import Manifest

            return Manifest.read(inside).base_model
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise MissingFileError(
            f"'{folder}' holds neither a pipeline nor a run of mmforget; check the path"
        )
    return None


def _run(given: Namespace, requirements: list[Any]) -> int:
    from mmforget.audit.memorization import audit_memorization
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.models.base import state_hash

    wanted = common.audit_settings(given, True)
    similarity = common.load_similarity_of(given)
    original = common.load_model(given, given.against)
    treated = common.load_model(given)
    for one in (original, treated):
        one.require_full_precision("the attack")
    memorized = common.load_memories(given, original)
    located, held_out = memorized.split(given.share, given.seed)
    clip = common.load_clip_of(given, original)
    name = Path(given.pipeline).name or "pipeline"
    with common.started(given, f"runs/attack-{name}") as (folder, stages, config):
        entry = ModelEntry(
            "treated", "unlearned", source=given.pipeline, details=common.facts_of(given.pipeline)
        )
        results = audit_memorization(
            AuditedModel(ModelEntry("original", "original", source=given.against), original),
            AuditedModel(entry, treated),
            located,
            similarity,
            held_out,
            wanted,
            clip=clip,
            title=given.title or f"Attack on {given.pipeline}",
            progress=not given.quiet,
            command="mmforget memorization attack",
            remember=stages.remember,
        )
        missed = check(results, requirements)
        stages.remove()
        facts = {
            "method": "attack",
            "base_hash": state_hash(original),
            "result_hash": state_hash(treated),
        }
        finish(folder, config, [located.request], results, given.ledger, facts)
    return common.show(given, folder, results, missed)
