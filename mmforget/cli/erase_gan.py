"""`mmforget erase` for generators of GANs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.pipelines import read_defaults, settings_of
from mmforget.cli.requirements import OF_GANS, Requirement, check, requirements_of
from mmforget.cli.run_files import announce, check_formats, emptied_on_failure, write_erasure
from mmforget.cli.settings import Options
from mmforget.concept import ConceptSpec
from mmforget.erase_gan import ADVERSARIAL, DEFAULT, SHIPPED, method_target
from mmforget.errors import ConfigurationError
from mmforget.method_names import check_settings
from mmforget.request import ForgetRequest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.audit.results import Results
    from mmforget.erase_gan import GANErasure
    from mmforget.models.gan import ImageGAN

HELP = """
usage: mmforget erase GENERATOR --concept WORDS [--alternative WORDS]... [options]

Makes the generator of a GAN forget what words name, without any picture: a CLIP model says what is
to be seen. It is checked on pictures drawn before and after at the same latents, by another judge.
Leaves a run folder with the generator, the results and the report.

what:
  GENERATOR             gan, gan_conditional, a folder with a generator.json, a run, or a file:
                        StyleGAN2, StyleGAN3, BigGAN-deep, or weights together with --network
  --concept WORDS       what to erase; several are erased at once
  --synonym WORDS       another word for the concept, if there is one
  --alternative WORDS   what a picture could show instead, such as the other digits for a digit
                        (default: the other values that the judge knows)
  --keep WORDS          a concept that must stay
  --anchor WORDS        what the concept becomes, for methods that have a use for it
  --kind KIND           object, style, person, attribute (default: object)
  --template TEXT       a sentence with {} in which the guide reads the concept
  --network CLASS       what a file of weights belongs to, such as module.Class
  --load NAME=VALUE     how the generator is loaded, such as prior=uniform

how:
  --guide CLIP          a CLIP folder or hf-hub:owner/name (default for gan: digit_world)
  --method METHOD       text-to-unlearn, anchor-distillation, clip-direction, clip-repulsion,
                        latent-negation, unit-ablation, class-rerouting, class-distillation,
                        adapt-then-unlearn, parameter-extrapolation, identity-unlearning,
                        module.Class (default: text-to-unlearn)
  --set NAME=VALUE      a setting of the method
  --steps N             training steps of a method that trains (default: 300)
  --seed N              of all random draws (default: 0)
  --device DEVICE       cpu, cuda, ... (default: a GPU if there is one)

check:
  --judge JUDGE         a classifier folder, digit_world, or hf-hub:owner/name of a CLIP model,
                        which judges zero-shot (default for gan: digit_world)
  --retrained FOLDER    a generator that was trained without the concept, as a control
  --attack NAME         latent_search, mapper, mapper_on_shell, prompt_boundary, inversion,
                        relearning
  --proxy WORDS         a concept that the generator never drew, as a control of the attacks
  --pictures N          that every model draws (default: 2000)
  --edits N             that are tried towards each concept (default: 512; 0 leaves them out)
  --trials N            of each attack (default: 100)
  --require CONDITION   exit with code 3 if it does not hold, such as 'target<=0.03',
                        'kept_worst>=0.8', 'same>=0.8', 'elicited<=0.05', 'attacks<=0.5'
  --no-audit            check nothing; the run then claims nothing

results:
  --run FOLDER          the run folder (default: runs/METHOD-erase-WORDS)
  --overwrite           replace an earlier run of this name
  --format FORMAT       what the artifact holds: weights, program (runs without mmforget),
                        state_dict (default: weights)
  --save FOLDER         a copy of the artifact elsewhere
  --title TEXT          title of the report
  --ledger FILE         the ledger (default: ledger.jsonl beside the run folder)
  --config FILE         YAML with the same names as keys; concepts may be mappings there
  --no-open             do not open the report in a browser
  --quiet               no progress bars

examples:
  mmforget erase gan --concept seven
  mmforget erase gan_conditional --concept seven --method class-rerouting
  mmforget erase ffhq.pkl --concept glasses --alternative 'a face without anything on it' \\
      --guide hf-hub:openai/clip-vit-base-patch32 \\
      --judge hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K --require 'target<=0.03'
"""

FORMATS = ("weights", "program", "state_dict")
STATE_FILE = "generator.pt"
WORLD, SIDE = "digit_world", 32
REAL_VARIANTS = 3
"""Drawings of each test stroke that stand for real pictures of the digit world."""


def run(args: list[str]) -> int:
    """Erase.

    Raises:
        MMForgetError: the settings are wrong, or a model cannot be loaded.
    """
    given = parsed(args)
    concepts = concepts_of(given)
    settings = settings_of(given.set)
    requirements = conditions_of(given)
    check_formats(given, FORMATS)
    method_target(given.method)
    return _run(given, concepts, settings, requirements)


def parsed(args: Sequence[str]) -> Namespace:
    """Read the command line, and the file it names.

    Raises:
        ConfigurationError, MissingFileError: see `Options` and `read_defaults`.
    """
    parser = Options("erase")
    parser.add_argument("generator", metavar="GENERATOR", nargs="?")
    for name in ("concept", "synonym", "alternative", "keep", "template", "load", "set",
                 "retrained", "attack", "require", "format"):  # fmt: skip
        parser.add_argument(f"--{name}", action="append", default=[])
    for name in ("anchor", "network", "guide", "judge", "proxy", "device", "run", "save", "title",
                 "ledger", "config"):  # fmt: skip
        parser.add_argument(f"--{name}")
    parser.add_argument("--kind", default="object")
    parser.add_argument("--method", default=DEFAULT)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--edits", type=int, default=512)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--audit", action="store_true", default=True)
    parser.add_argument("--no-audit", action="store_false", dest="audit")
    for name in ("overwrite", "no-open", "quiet"):
        parser.add_argument(f"--{name}", action="store_true")
    first = parser.parse_args(args)
    if first.config:
        parser.set_defaults(**read_defaults(first.config, vars(first)))
        first = parser.parse_args(args)
    if not first.concept:
        raise ConfigurationError(
            "`mmforget erase` needs `--concept`, the words that name what to erase"
        )
    if first.generator in SHIPPED:
        first.guide = first.guide or WORLD
        first.judge = first.judge or WORLD
    if first.audit and not first.judge:
        raise ConfigurationError(
            "the audit needs `--judge`, a classifier folder or a CLIP model that does not guide; "
            "give one, or `--no-audit`"
        )
    if first.attack and not first.guide:
        raise ConfigurationError(
            "`--attack` needs `--guide`: what it finds counts only if a second model agrees with "
            "the judge"
        )
    return first


def concepts_of(given: Namespace) -> tuple[ConceptSpec, ...]:
    """The concepts of the command line; see `mmforget.cli.erase.concepts_of`."""
    from mmforget.cli import erase

    return erase.concepts_of(given)


def conditions_of(given: Namespace) -> list[Requirement]:
    """The conditions of the command line.

    Raises:
        ConfigurationError: a condition that nothing will be measured for.
    """
    found = requirements_of(given, OF_GANS)
    if any(one.name == "elicited" for one in found) and not given.guide:
        raise ConfigurationError("`--require elicited` needs `--guide`, which edits follow")
    return found


# ---- the run -------------------------------------------------------------------------------------


def _run(
    given: Namespace,
    concepts: tuple[ConceptSpec, ...],
    settings: dict[str, Any],
    requirements: list[Requirement],
) -> int:
    from mmforget.artifacts.run_folder import RunFolder
    from mmforget.audit.generator_attacks import check_attacks
    from mmforget.erase_gan import GIVEN, find_method, run_gan_erasure
    from mmforget.models.base import state_hash

    cls = find_method(given.method)
    check_settings(cls, settings, GIVEN)
    wanted = audit_settings(given)
    original = load(given)
    guide, judge = readers(given, concepts)
    alternatives = alternatives_of(given, concepts, judge)
    real = real_pictures() if given.judge == WORLD and original.resolution == (SIDE, SIDE) else None
    check_attacks(wanted.attacks, guide, real)
    request = ForgetRequest(concepts=concepts)
    if not given.quiet:
        print(f"{cls.__name__} on {given.generator}", file=sys.stderr)
    name = f"{given.method.rpartition('.')[2]}-{request.name}"
    folder = RunFolder(given.run or f"runs/{name}", overwrite=given.overwrite)
    with folder, emptied_on_failure(folder):
        base_hash = state_hash(original)
        done = run_gan_erasure(
            original, concepts, given.method, guide, alternatives, settings, given.steps,
            given.seed, copy=True, progress=not given.quiet,
        )  # fmt: skip
        results, missed = None, []
        if given.audit:
            results = measure(
                given,
                original,
                done,
                concepts,
                judge,
                guide,
                alternatives,
                wanted,
                real,
                base_hash,
            )
            missed = check(results, requirements)
        write(folder, given, done, request, results, base_hash, settings)
    return announce(
        folder, results, columns_of(concepts, given), missed, given.save, not given.no_open
    )


def load(given: Namespace) -> ImageGAN:
    """Load the generator, with its discriminator for methods that need one.

    Raises:
        MMForgetError: see `load_gan`.
    """
    import torch

    from mmforget.models.gan_files import load_gan

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = method_target(given.method)
    adversarial = target in [method_target(name) for name in ADVERSARIAL]
    model = load_gan(
        given.generator,
        given.network,
        discriminator=adversarial,
        **settings_of(given.load, "--load"),
    )
    return model.to(device)


def readers(given: Namespace, concepts: Sequence[ConceptSpec]) -> tuple[Any, Any]:
    """The guide, and the judge of the audit.

    Raises:
        MissingFileError: there is no such model.
        RequestError: a concept that the judge cannot see.
        ConfigurationError: they are the same model.
    """
    from mmforget.audit.concept_judge import zero_shot
    from mmforget.audit.concept_pictures import known_facts
    from mmforget.metrics.judge import load_judge
    from mmforget.models.clip import load_clip

    guide = load_clip(given.guide) if given.guide else None
    if not given.audit:
        return guide, None
    judge: Any
    if given.judge.startswith("hf-hub:"):
        if given.judge == given.guide:
            raise ConfigurationError(
                f"`--judge` and `--guide` are both '{given.judge}': a judge that guided sees what "
                "it was made to see; give another one"
            )
        others = {c.target: given.alternative for c in concepts}
        named = [replace(c, preserve=c.preserve or tuple(others[c.target])) for c in concepts]
        judge = zero_shot(load_clip(given.judge), named)
    else:
        judge = load_judge(given.judge)
    for concept in concepts:
        known_facts(judge, "concept", concept.words)
        for word in concept.preserve:
            known_facts(judge, "preserve", [word])
    return guide, judge


def alternatives_of(
    given: Namespace, concepts: Sequence[ConceptSpec], judge: Any
) -> dict[str, Sequence[str]] | None:
    """What else pictures could show, per target: as asked, else what the judge knows.

    Raises:
        ConfigurationError: one list for several concepts.
    """
    if given.alternative:
        if len(concepts) > 1:
            raise ConfigurationError(
                f"`--alternative` was given for {len(concepts)} concepts, so that it is unclear "
                "whose they are; leave it out, or erase them one by one"
            )
        return {concepts[0].target: list(given.alternative)}
    if judge is None or given.judge.startswith("hf-hub:"):
        return None
    from mmforget.audit.concept_pictures import known_facts
    from mmforget.audit.generators import other_values

    found = {
        concept.target: other_values(judge, known_facts(judge, "concept", concept.words))
        for concept in concepts
    }
    return {target: others for target, others in found.items() if others}


def audit_settings(given: Namespace) -> Any:
    """Settings of the audit.

    Raises:
        ConfigurationError: see `GANAuditSettings`.
    """
    from mmforget.audit.generators import GANAuditSettings

    return GANAuditSettings(
        seed=given.seed,
        pictures=given.pictures,
        edits=given.edits,
        attacks=tuple(given.attack),
        attack_trials=given.trials,
        proxy=given.proxy or "",
    )


def measure(
    given: Namespace,
    original: ImageGAN,
    done: GANErasure,
    concepts: Sequence[ConceptSpec],
    judge: Any,
    guide: Any,
    alternatives: Mapping[str, Sequence[str]] | None,
    wanted: Any,
    real: Any,
    base_hash: str,
) -> Results:
    """Audit the result."""
    from mmforget.audit.generators import audit_gan
    from mmforget.audit.results import ModelEntry
    from mmforget.audit.scene import AuditedModel
    from mmforget.models.gan_files import load_gan

    method, device = done.method, next(original.network.parameters()).device
    entry = ModelEntry(
        "unlearned",
        "unlearned",
        source="this run",
        method=type(method).__name__,
        access=type(method).access.to_dict(),
        cost=dict(done.cost),
        details={k: v for k, v in method.statistics().items() if k not in ("concepts", "guide")},
    )
    retrained = [
        AuditedModel(
            ModelEntry(f"retrained {number}" if len(given.retrained) > 1 else "retrained",
                       "retrained", source=source),
            load_gan(source).to(device),
        )
        for number, source in enumerate(given.retrained, 1)
    ]  # fmt: skip
    if hasattr(judge, "classifier"):
        judge.classifier.to(device)
    return audit_gan(
        AuditedModel(ModelEntry("original", "original", base_hash, given.generator), original),
        AuditedModel(entry, done.model.to(device)),
        concepts,
        judge,
        guide.to(device) if guide is not None else None,
        wanted,
        retrained,
        alternatives=alternatives,
        real=real,
        title=given.title or "",
        progress=not given.quiet,
        command="mmforget erase",
    )


def real_pictures() -> Any:
    """Pictures of the digit world's test strokes, which models do not train on, in [0, 1]."""
    import numpy as np

    from mmforget.data.digit_world import VARIANTS, render, stage_strokes

    strokes = stage_strokes()["test"]
    ids = np.concatenate([strokes * VARIANTS + variant for variant in range(REAL_VARIANTS)])
    return render(ids).float() / 255


def columns_of(
    concepts: Sequence[ConceptSpec], given: Namespace
) -> tuple[tuple[str, str, str], ...]:
    """What the table on the terminal shows."""
    columns = [(c.target, "native_rate", f"native/{c.target}") for c in concepts[:3]]
    columns.append(("when edited", "elicited_rate", f"edited/{concepts[0].target}"))
    columns.append(("worst kept", "kept_worst", "kept"))
    for name in given.attack:
        columns.append((name.replace("_", " "), f"attack_{name}", f"native/{concepts[0].target}"))
    return tuple(columns)


# ---- writing -------------------------------------------------------------------------------------


class Saved:
    """What `save_artifact` writes: the formats that were asked for."""

    def __init__(self, model: ImageGAN, formats: Sequence[str]) -> None:
        self._model, self._formats = model, formats or ["weights"]

    def state_dict(self) -> dict[str, Any]:
        """Of the unlearned model, for its hash."""
        return self._model.state_dict()

    def save_native(self, folder: Path) -> None:
        """Write the formats side by side."""
        import torch

        for name in self._formats:
            if name == "weights":
                self._model.save_native(folder)
            elif name == "program":
                self._model.save_program(folder)
            else:
                state = {
                    key: value.detach().cpu().contiguous()
                    for key, value in self._model.network.state_dict().items()
                }
                torch.save(state, folder / STATE_FILE)


def write(
    folder: Any,
    given: Namespace,
    done: GANErasure,
    request: ForgetRequest,
    results: Results | None,
    base_hash: str,
    settings: Mapping[str, Any],
) -> None:
    """Leave behind what every run leaves behind, and enter it into the ledger."""
    write_erasure(
        folder,
        given,
        given.generator,
        base_hash,
        type(done.method).__name__,
        settings,
        Saved(done.model, given.format),
        [request],
        results,
        "mmforget",
    )
