"""`mmforget erase`: make a text-to-image pipeline forget concepts, from the shell, without YAML."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.pipelines import (
    WORLD,
    check_dtype,
    load_pipeline,
    read_defaults,
    settings_of,
)
from mmforget.cli.requirements import Requirement, check, requirements_of
from mmforget.cli.run_files import announce, check_formats, emptied_on_failure, write_erasure
from mmforget.cli.settings import Options
from mmforget.concept import ConceptSpec, check_together
from mmforget.erase import as_concepts, method_target
from mmforget.errors import ConfigurationError
from mmforget.method_names import check_settings
from mmforget.request import ForgetRequest, slug

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.audit.results import Results
    from mmforget.erase import Erasure
    from mmforget.models.diffusion import DiffusionGenerator

HELP = """
usage: mmforget erase PIPELINE --concept WORDS [--keep WORDS]... [options]

For the generator of a GAN (gan, gan_conditional, a folder or a file of weights), see
`mmforget erase gan --help`.

Makes a text-to-image pipeline forget what words name, checks it on pictures drawn before and after
at the same seeds, and leaves a run folder with the pipeline, the results and the report.
Options that can be given several times are repeated; commas separate nothing.

what:
  PIPELINE              a diffusers folder, a hub id, digit_world or digit_world_transformer
  --concept WORDS       what to erase; several are erased at once
  --one-after-another   erase several concepts in sequence instead
  --synonym WORDS       another word for the concept, if there is one
  --keep WORDS          a concept that must stay
  --anchor WORDS        what the concept becomes ('' is a picture without prompt)
  --kind KIND           object, style, person, unsafe, memorized (default: object)
  --template TEXT       a sentence with {} in which the concept is erased and looked for

how:
  --method METHOD       uce, rece, esd, concept-ablation, salun, sld, auto, module.Class
                        (default: uce)
  --set NAME=VALUE      a setting of the method
  --steps N             training steps of a method that trains (default: 200)
  --after EDIT          an earlier edit that is applied first
  --seed N              of all random draws (default: 0)
  --dtype TYPE          float32, float16, bfloat16 (default: float32)
  --device DEVICE       cpu, cuda, ... (default: a GPU if there is one)

check:
  --judge JUDGE         a classifier folder, or digit_world
  --clip MODEL          a CLIP folder or hf-hub:owner/name; judges if there is no --judge
  --attack NAME         concept_inversion, prompts, adversarial_prompt, sdedit, latent_inversion
  --pictures N          pictures per erased word (default: 40)
  --sampling-steps N    steps of the sampler (default: 20)
  --guidance SCALE      guidance of the sampler (default: 3 for digit_world, else 7.5)
  --require CONDITION   exit with code 3 if it does not hold, such as 'target<=0.1',
                        'synonyms<=0.1', 'preserved>=0.8', 'preserved_drop<=0.03', 'attacks<=0.2'
  --no-audit            check nothing; the run then claims nothing

results:
  --run FOLDER          the run folder (default: runs/METHOD-erase-WORDS)
  --overwrite           replace an earlier run of this name
  --format FORMAT       what the artifact holds: pipeline, lora, kohya, edit (default: pipeline)
  --rank N              rank of a LoRA made of an edit that is none
  --save FOLDER         a copy of the artifact elsewhere
  --title TEXT          title of the report
  --ledger FILE         the ledger (default: ledger.jsonl beside the run folder)
  --config FILE         YAML with the same names as keys; concepts may be mappings there
  --no-open             do not open the report in a browser
  --quiet               no progress bars

examples:
  mmforget erase digit_world --concept seven --synonym 7 --keep one --keep eight --keep red
  mmforget erase stable-diffusion-v1-5/stable-diffusion-v1-5 --concept 'Van Gogh' --kind style \\
      --keep Monet --keep Picasso --clip hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K
  mmforget erase sd15/ --concept 'tench' --keep 'goldfish' --method esd --set weights=self \\
      --require 'target<=0.1' --require 'preserved_drop<=0.03' --format lora --save tench-lora
"""

FORMATS = ("pipeline", "lora", "kohya", "edit")
FLAGS = ("--audit", "--no-audit", "--one-after-another", "--overwrite", "--no-open", "--quiet",
         "--help", "-h")  # fmt: skip
"""Options without a value."""

TOGETHER = "a {ink} {digit}"  # sentence of the digit world that names several facts


def help_for(args: Sequence[str]) -> str:
    """The help that fits what is to be edited."""
    from mmforget.cli import erase_gan

    return erase_gan.HELP if names_gan(args) else HELP


def names_gan(args: Sequence[str]) -> bool:
    """Whether the argument that is no option, nor the value of one, is the generator of a GAN."""
    from mmforget.erase_gan import is_gan

    value = False
    for arg in args:
        if arg.startswith("-"):
            value = arg not in FLAGS and "=" not in arg
        elif value:
            value = False
        else:
            return is_gan(arg)
    return False


def run(args: list[str]) -> int:
    """Erase.

    Raises:
        MMForgetError: the settings are wrong, or a model cannot be loaded.
    """
    if names_gan(args):
        from mmforget.cli import erase_gan

        return erase_gan.run(args)
    given = parsed(args)
    concepts = concepts_of(given)
    settings = settings_of(given.set)
    requirements = requirements_of(given)
    check_saving(given)
    if given.method != "auto":
        method_target(given.method)
    return _run(given, concepts, settings, requirements)


def parsed(args: Sequence[str]) -> Namespace:
    """Read the command line, and the file it names.

    Raises:
        ConfigurationError, MissingFileError: see `Options` and `_file`.
    """
    parser = Options("erase")
    parser.add_argument("pipeline", metavar="PIPELINE", nargs="?")
    for name in ("concept", "synonym", "keep", "template", "set", "after", "attack", "require",
                 "format"):  # fmt: skip
        parser.add_argument(f"--{name}", action="append", default=[])
    for name in ("anchor", "judge", "clip", "device", "run", "save", "title", "ledger", "config"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--kind", default="object")
    parser.add_argument("--method", default="uce")
    parser.add_argument("--dtype", default="float32")
    for name in ("steps", "rank", "sampling-steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--audit", action="store_true", default=True)
    parser.add_argument("--no-audit", action="store_false", dest="audit")
    for name in ("one-after-another", "overwrite", "no-open", "quiet"):
        parser.add_argument(f"--{name}", action="store_true")
    first = parser.parse_args(args)
    if first.config:
        parser.set_defaults(**read_defaults(first.config, vars(first)))
        first = parser.parse_args(args)
    if not first.pipeline:
        raise ConfigurationError(
            "`mmforget erase` needs PIPELINE, a diffusers folder, a hub id or digit_world; "
            "see `mmforget erase --help`"
        )
    if not first.concept:
        raise ConfigurationError(
            "`mmforget erase` needs `--concept`, the words that name what to erase"
        )
    check_dtype(first.dtype)
    return first


def concepts_of(given: Namespace) -> tuple[ConceptSpec, ...]:
    """The concepts of the command line.

    Raises:
        RequestError: see `as_concepts`.
    """
    named = [
        ConceptSpec.from_dict({"preserve": given.keep, **one}) if isinstance(one, Mapping) else one
        for one in given.concept
    ]
    words = any(isinstance(one, str) for one in named)
    concepts = as_concepts(
        named,
        given.keep if words else (),
        given.synonym,
        given.anchor,
        given.kind,
        given.template,
    )
    check_together(concepts)
    return concepts


def check_saving(given: Namespace) -> None:
    """Refuse formats that do not exist, or a rank without use.

    Raises:
        ConfigurationError: see above.
    """
    check_formats(given, FORMATS)
    if given.rank is not None and not {"lora", "kohya"} & set(given.format):
        raise ConfigurationError(
            "`--rank` belongs to `--format lora` or `--format kohya`; add one of them"
        )


# ---- the run -------------------------------------------------------------------------------------


def _run(
    given: Namespace,
    concepts: tuple[ConceptSpec, ...],
    settings: dict[str, Any],
    requirements: list[Requirement],
) -> int:
    from mmforget.artifacts.run_folder import RunFolder
    from mmforget.erase import GIVEN, automatic, find_method, run_erasure
    from mmforget.models.base import state_hash

    wanted = audit_settings(given)
    judge, clip = readers(given, concepts, wanted) if given.audit else (None, None)
    if given.method != "auto":
        check_settings(find_method(given.method), settings, GIVEN)
    original = load_pipeline(
        given.pipeline,
        given.device,
        given.dtype,
        given.sampling_steps,
        given.guidance,
        given.after,
    )
    original.check_length([p for c in concepts for word in c.words for p in c.prompts(word)])
    if given.audit:
        original.require_full_precision("the audit")
    method = automatic(original, concepts) if given.method == "auto" else given.method
    requests = requests_of(concepts, given.one_after_another)
    name = f"{method.rpartition('.')[2]}-{requests[-1].name}"
    if not given.quiet:
        print(f"{find_method(method).__name__} on {given.pipeline}", file=sys.stderr)
    folder = RunFolder(given.run or f"runs/{name}", overwrite=given.overwrite)
    with folder, emptied_on_failure(folder):
        base_hash = state_hash(original)
        done = run_erasure(
            original,
            concepts,
            method,
            settings,
            sequence=given.one_after_another,
            steps=given.steps,
            seed=given.seed,
            copy=given.audit,  # the audit compares with the original
            progress=not given.quiet,
        )
        results, missed = None, []
        if given.audit:
            results = measure(given, original, done, concepts, judge, clip, wanted, base_hash)
            missed = check(results, requirements)
        write(folder, given, done, requests, results, base_hash, settings)
    return announce(
        folder, results, columns_of(concepts, given), missed, given.save, not given.no_open
    )


def requests_of(concepts: Sequence[ConceptSpec], sequence: bool) -> list[ForgetRequest]:
    """One request for all concepts, or one for each."""
    parts = [(concept,) for concept in concepts] if sequence else [tuple(concepts)]
    return [ForgetRequest(concepts=part) for part in parts]


def audit_settings(given: Namespace) -> Any:
    """Settings of the audit.

    Raises:
        ConfigurationError: see `ConceptAuditSettings`.
    """
    from mmforget.audit.concepts import ConceptAuditSettings

    world = given.judge == "digit_world" or (given.judge is None and given.pipeline in WORLD)
    return ConceptAuditSettings(
        seed=given.seed,
        pictures=given.pictures,
        preserved_pictures=max(1, given.pictures // 2),
        steps=given.sampling_steps,
        together=TOGETHER if world else "",
        attacks=tuple(given.attack),
    )


def readers(given: Namespace, concepts: Sequence[ConceptSpec], wanted: Any) -> tuple[Any, Any]:
    """Judge and CLIP model; for the digit world the shipped ones, unless others are named.

    Raises:
        MissingFileError: there is no such model.
        RequestError: a concept that the judge cannot see.
    """
    from mmforget.audit.concept_pictures import plan
    from mmforget.metrics.judge import load_judge
    from mmforget.models.clip import load_clip

    own = "digit_world" if given.pipeline in WORLD else ""
    sources: list[str] = [given.judge or own, given.clip or own]
    judge: Any = load_judge(sources[0]) if sources[0] else None
    clip = load_clip(sources[1]) if sources[1] else None
    plan(concepts, judge, wanted.pictures, wanted.preserved_pictures, wanted.together)
    return judge, clip


def measure(
    given: Namespace,
    original: DiffusionGenerator,
    done: Erasure,
    concepts: Sequence[ConceptSpec],
    judge: Any,
    clip: Any,
    wanted: Any,
    base_hash: str,
) -> Results:
    """Audit the result."""
    from mmforget.audit.concepts import audit_generator
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel

    last = done.methods[-1]
    entry = ModelEntry(
        "unlearned",
        "unlearned",
        source="this run",
        method=type(last).__name__,
        access=type(last).access.to_dict(),
        cost=dict(done.cost) | sizes_of(done),
        details={k: v for k, v in last.statistics().items() if k != "concepts"},
    )
    device = next(original.network.parameters()).device
    if clip is not None:
        clip = clip.to(device)
    if hasattr(judge, "classifier"):
        judge.classifier.to(device)
    return audit_generator(
        AuditedModel(ModelEntry("original", "original", base_hash, given.pipeline), original),
        AuditedModel(entry, done.model),
        concepts,
        judge,
        clip,
        wanted,
        title=given.title or "",
        progress=not given.quiet,
        command="mmforget erase",
    )


def sizes_of(done: Erasure) -> dict[str, int]:
    """Size of the edit, where there is one."""
    if not done.methods[-1].saves_adapter:
        return {}
    return {"edit_bytes": sum(one.weight_edit().size_bytes for one in done.methods)}


def columns_of(
    concepts: Sequence[ConceptSpec], given: Namespace
) -> tuple[tuple[str, str, str], ...]:
    """What the table on the terminal shows."""
    columns = []
    for concept in concepts[:3]:
        columns.append((concept.target, "target_rate", f"target/{concept.target}"))
        columns += [(word, "target_rate", f"synonym/{word}") for word in concept.synonyms[:1]]
    columns.append(("preserved", "preserved_rate", "preserved"))
    columns.append(("worst", "preserved_worst", "preserved"))
    for name in given.attack:
        columns.append((name.replace("_", " "), f"attack_{name}", f"target/{concepts[0].target}"))
    return tuple(columns)


# ---- writing -------------------------------------------------------------------------------------


class Saved:
    """What `save_artifact` writes: the formats that were asked for, instead of the whole model."""

    def __init__(self, done: Erasure, given: Namespace, requests: Sequence[ForgetRequest]) -> None:
        self._done, self._given, self._requests = done, given, requests

    def state_dict(self) -> dict[str, Any]:
        """Of the unlearned model, for its hash."""
        return self._done.model.state_dict()

    def save_native(self, folder: Path) -> None:
        """Write the formats; one in the folder itself, several in one folder each."""
        formats = self._given.format or ["pipeline"]
        for name in formats:
            target = folder if len(formats) == 1 or name == "pipeline" else folder / name
            target.mkdir(exist_ok=True)
            if name == "pipeline":
                self._done.model.save_native(target)
                continue
            for method, request in zip(self._done.methods, self._requests, strict=True):
                own = target if len(self._requests) == 1 else target / slug(request.name)
                own.mkdir(exist_ok=True)
                self._write(method, name, own)

    def _write(self, method: Any, name: str, folder: Path) -> None:
        if not method.saves_adapter:
            raise ConfigurationError(
                f"{type(method).__name__} changes no weights, so there is nothing to save as "
                f"'{name}'; use `--format pipeline`"
            )
        edit = method.weight_edit()
        if name == "edit":
            edit.save(folder)
            return
        if edit.kind != "lora":
            if self._given.rank is None:
                raise ConfigurationError(
                    f"{type(method).__name__} changed whole weights, which are no LoRA; add "
                    "`--rank N` for an approximation, or use `--format edit`"
                )
            edit = edit.to_lora(method._given[0], self._given.rank)
        edit.save_lora(folder, naming="kohya" if name == "kohya" else "diffusers")


def write(
    folder: Any,
    given: Namespace,
    done: Erasure,
    requests: Sequence[ForgetRequest],
    results: Results | None,
    base_hash: str,
    settings: Mapping[str, Any],
) -> None:
    """Leave behind what every run leaves behind, and enter it into the ledger."""
    adapters = {
        request.name: one.save_adapter
        for one, request in zip(done.methods, requests, strict=True)
        if one.saves_adapter
    }
    write_erasure(
        folder,
        given,
        given.pipeline,
        base_hash,
        type(done.methods[-1]).__name__,
        settings,
        Saved(done, given, requests),
        requests,
        results,
        "diffusers",
        adapters,
    )
