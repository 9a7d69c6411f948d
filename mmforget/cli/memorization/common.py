"""What the commands on memorized pictures share: options, inputs, the audit, kept results."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.pipelines import (
    PLANTED,
    check_dtype,
    load_pipeline,
    read_defaults,
    settings_of,
)
from mmforget.cli.requirements import OF_MEMORIES, Requirement
from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError, MissingFileError, RunExistsError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.artifacts.run_folder import RunFolder
    from mmforget.audit.memorization import MemorizationAuditSettings
    from mmforget.audit.results import Results
    from mmforget.data.memorized import MemorizedSet
    from mmforget.metrics.copying import CopySimilarity
    from mmforget.models.diffusion import DiffusionGenerator

MEMORIES_HELP = """
memories:
  --memorized SET       planted, a list (.csv .tsv .json .jsonl .txt) or a folder of pictures with
                        their prompts (default: planted for the shipped pipelines)
  --images FOLDER       the training pictures of a list
  --retain SET          ordinary prompts, better with pictures, that may be used for the work
  --test SET            ordinary prompts and pictures for measurements only
  --controls FOLDER     pictures like the memorized ones that were never trained on
  --skip-missing        go on where training pictures are missing; the report says how many
  --share SHARE         part of the prompts that is worked on; the rest is held out (default: 0.5)
  --similarity NAME     ncc, l2, or the file of a copy-detection network (default: ncc for the
                        shipped pipelines, else l2)
  --similarity-set NAME=VALUE   a setting of it, such as preset=wen2024
"""

CHECK_HELP = """
check:
  --pictures N          per memorized prompt (default: 10)
  --ordinary N          pictures of ordinary prompts (default: 64)
  --detection N         pictures per prompt of the detector, 0 to leave it out (default: 4)
  --sampling-steps N    steps of the sampler (default: 20)
  --guidance SCALE      guidance of the sampler (default: 3 for shipped pipelines, else 7.5)
  --clip MODEL          a CLIP folder or hf-hub:owner/name, for ordinary prompts
  --attack-steps N      steps after which the attack is looked at; give several (default: 0 10 25
                        50 100)
  --attack-start NAME   where it starts: random, trigger, ordinary (default: random and trigger)
  --require CONDITION   exit with code 3 if it does not hold, such as 'copies<=0', 'attack<=0.1',
                        'held_out_copies<=0.1', 'likeness<=0.5', 'specificity>=0.1',
                        'loss_rise<=0.05', 'kid<=0.01'
"""

RUN_HELP = """
run:
  --run FOLDER          the run folder (default: runs/...)
  --resume              go on with a run that was stopped; what is finished is not done again
  --overwrite           replace an earlier run of this name
  --config FILE         YAML with the same names as keys
  --seed N              of all random draws (default: 0)
  --dtype TYPE          float32, float16, bfloat16 (default: float32)
  --device DEVICE       cpu, cuda, ... (default: a GPU if there is one)
  --quiet               no progress bars
"""

REPORT_HELP = """
report:
  --title TEXT          its title
  --examples N          prompts of each kind whose pictures it shows; 0 for none (default: 4)
  --no-open             do not open it in a browser
  --ledger FILE         the ledger (default: ledger.jsonl beside the run folder)
"""

NOT_OF_THE_RESULT = (
    "config", "run", "resume", "overwrite", "no_open", "quiet", "ledger", "device",
)  # fmt: skip
"""Options that change no result: they may differ when a run is resumed."""


INHERITED = (
    "memorized", "images", "retain", "test", "controls", "similarity", "similarity_set",
    "sampling_steps", "guidance",
)  # fmt: skip
"""Options that `attack` and `repair` take from the run that PIPELINE is the result of."""


# ---- options -------------------------------------------------------------------------------------


def parser_of(command: str) -> Options:
    """A parser with the options that all commands have."""
    parser = Options(f"memorization {command}")
    parser.add_argument("pipeline", metavar="PIPELINE", nargs="?")
    for name in ("device", "run", "config"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampling-steps", type=int)
    parser.add_argument("--guidance", type=float)
    for name in ("resume", "overwrite", "quiet"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def add_memories(parser: Options) -> None:
    """Options that name memorized pictures, and how copies are told."""
    for name in ("memorized", "images", "retain", "test", "controls", "similarity"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--similarity-set", action="append", default=[])
    parser.add_argument("--skip-missing", action="store_true")
    parser.add_argument("--share", type=float, default=0.5)


def add_checks(parser: Options) -> None:
    """Options of the audit and of its report."""
    for name in ("title", "ledger"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--no-open", action="store_true")
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--ordinary", type=int, default=64)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--detection", type=int, default=4)
    parser.add_argument("--clip")
    parser.add_argument("--attack-steps", type=int, action="append", default=[])
    for name in ("attack-start", "require"):
        parser.add_argument(f"--{name}", action="append", default=[])


def parsed(parser: Options, args: Sequence[str]) -> Namespace:
    """Read the command line, and the file it names.

    Raises:
        ConfigurationError, MissingFileError: see `Options` and `read_defaults`.
    """
    given = parser.parse_args(args)
    if given.config:
        parser.set_defaults(**read_defaults(given.config, vars(given)))
        given = parser.parse_args(args)
    if not given.pipeline:
        raise ConfigurationError(
            f"`{parser.prog}` needs PIPELINE, a diffusers folder, a hub id, or "
            f"{' or '.join(PLANTED)}; see `{parser.prog} --help`"
        )
    check_dtype(given.dtype)
    return given


def requirements_of(given: Namespace, attack: bool) -> list[Requirement]:
    """The conditions of the command line.

    Raises:
        ConfigurationError: a condition that nothing will be measured for.
    """
    found = [Requirement.parse(text, OF_MEMORIES) for text in given.require]
    if any(one.name == "attack" for one in found) and not attack:
        raise ConfigurationError("`--require attack` needs the attack; add `--attack`")
    if any(one.name == "held_out_copies" for one in found) and given.share >= 1:
        raise ConfigurationError(
            "`--require held_out_copies` needs prompts that are held out; use a `--share` below 1"
        )
    return found


def find_class(name: str, known: Mapping[str, str], option: str) -> Any:
    """Resolve a short name or a dotted path.

    Raises:
        ConfigurationError: there is no such class; names the nearest.
    """
    module, _, attribute = known.get(name, name.replace(".", ":")).partition(":")
    if name not in known:
        module, dot, attribute = name.rpartition(".")
        if not dot:
            raise ConfigurationError(f"`{option}` is '{name}'; {suggest(name, known)}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if name in known:
            raise
        raise ConfigurationError(
            f"there is no class '{name}'; give module.Class, or one of {', '.join(known)}"
        ) from error


# ---- inputs --------------------------------------------------------------------------------------


def memorized_name(given: Namespace) -> str:
    """What `--memorized` names, checked without loading anything.

    Raises:
        ConfigurationError: nothing was named.
        MissingFileError: there is no such file or folder.
    """
    name = given.memorized or ("planted" if given.pipeline in PLANTED else None)
    if not name:
        raise ConfigurationError(
            "`--memorized` is missing: give a list of memorized prompts or a folder of pictures; "
            "`mmforget memorization find` makes one from prompts alone"
        )
    for option in ("memorized", "images", "retain", "test", "controls"):
        path = name if option == "memorized" else getattr(given, option)
        if path and path != "planted" and not Path(path).expanduser().exists():
            raise MissingFileError(
                f"`--{option}` is '{path}', but there is no such file or folder; check the path"
            )
    return str(name)


def load_memories(given: Namespace, model: DiffusionGenerator) -> MemorizedSet:
    """The memorized set, with pictures of the model's size.

    Raises:
        MMForgetError: see `mmforget.data.memorized_files`.
    """
    from mmforget.data.memorized_files import resolve

    side = model.latent_shape[1] * model.pipeline.vae_scale_factor
    return resolve(
        memorized_name(given),
        images=given.images,
        retain=given.retain,
        test=given.test,
        controls=given.controls,
        size=int(side),
        on_missing="skip" if given.skip_missing else "raise",
    )


def load_similarity_of(given: Namespace) -> CopySimilarity:
    """What tells copies.

    Raises:
        MMForgetError: see `load_similarity`.
    """
    from mmforget.metrics.copying import load_similarity

    name = given.similarity or ("ncc" if memorized_name(given) == "planted" else "l2")
    return load_similarity(name, **settings_of(given.similarity_set, "--similarity-set"))


def load_model(given: Namespace, name: str | None = None) -> DiffusionGenerator:
    """A pipeline with the settings of the command line; a run folder stands for its artifact.

    Raises:
        MMForgetError: see `load_pipeline`.
    """
    return load_pipeline(
        artifact_of(name or given.pipeline),
        given.device,
        given.dtype,
        given.sampling_steps,
        given.guidance if given.guidance is not None else _usual(given),
    )


def _usual(given: Namespace) -> float | None:
    """A run folder holds a shipped pipeline where its memories are the planted ones."""
    planted = getattr(given, "memorized", None) == "planted"
    return 3.0 if planted else None


def artifact_of(name: str) -> str:
    """The pipeline in a run folder; everything else stays."""
    inside = Path(name) / "artifact"
    return str(inside) if (inside / "model_index.json").is_file() else name


def inherit(given: Namespace, names: Sequence[str]) -> None:
    """Take what was not given from the run that PIPELINE is the result of.

    Args:
        given: changed in place.
        names: options that may be inherited.
    """
    import yaml

    file = Path(given.pipeline) / "config.yaml"
    if not file.is_file():
        return
    earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name in names:
        if getattr(given, name, None) in (None, []) and name in earlier:
            setattr(given, name, earlier[name])


def facts_of(name: str) -> dict[str, Any]:
    """What the audit of a run folder says of its model; nothing for other pipelines."""
    file = Path(name) / "results.json"
    if not file.is_file():
        return {}
    from mmforget.audit.results import Results

    found = Results.load(file).by_role("unlearned")
    details = found[0].details if len(found) == 1 else {}
    return {key: value for key, value in details.items() if not key.startswith("outcome")}


def audit_settings(given: Namespace, attack: bool) -> MemorizationAuditSettings:
    """Settings of the audit.

    Raises:
        ConfigurationError: see `MemorizationAuditSettings`.
    """
    from mmforget.audit.memorization import MemorizationAuditSettings

    further: dict[str, Any] = {}
    if given.attack_steps:
        further["attack_budgets"] = tuple(given.attack_steps)
        further["min_attack_steps"] = min(50, max(given.attack_steps))
    if given.attack_start:
        further["attack_inits"] = tuple(given.attack_start)
    return MemorizationAuditSettings(
        seed=given.seed,
        pictures=given.pictures,
        ordinary=given.ordinary,
        steps=given.sampling_steps,
        examples=given.examples,
        detection=given.detection,
        attack=attack,
        **further,
    )


def load_clip_of(given: Namespace, model: DiffusionGenerator) -> Any:
    """The CLIP model, or None."""
    if not given.clip:
        return None
    from mmforget.models.clip import load_clip

    return load_clip(given.clip).to(next(model.network.parameters()).device)


# ---- kept results --------------------------------------------------------------------------------


class Stages:
    """Results of the finished parts of a run, so that a stopped one can go on.

    They lie in the folder of the unfinished run, with the settings that they belong to.

    Args:
        folder: of the run.
        config: the settings; a resumed run must have the same.

    Raises:
        ConfigurationError: the run was started with other settings.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        from mmforget.artifacts.run_folder import atomic_write

        self.path = folder.work / "stages"
        file, text = self.path / "settings.json", json.dumps(dict(config), sort_keys=True)
        if file.is_file():
            earlier, now = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
            wrong = [k for k in sorted(earlier.keys() | now.keys()) if earlier.get(k) != now.get(k)]
            if wrong:
                key = wrong[0]
                raise ConfigurationError(
                    f"the run '{folder.path}' was started with {key} = {earlier.get(key)}, now it "
                    f"is {now.get(key)}; resume it with the same settings, or start anew"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write(file, text)

    def file(self, name: str) -> Path:
        """Where something is kept."""
        return self.path / name

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """The plain result of a computation, read back if it was made before."""
        from mmforget.artifacts.run_folder import atomic_write
        from mmforget.artifacts.save import folder_name

        file = self.file(f"{folder_name(name)}.json")
        if not file.is_file():
            atomic_write(file, json.dumps(compute(), allow_nan=False, default=_plain))
        found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def remove(self) -> None:
        """Delete everything: the run is complete."""
        import shutil

        shutil.rmtree(self.path)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


@contextmanager
def started(given: Namespace, default: str) -> Iterator[tuple[RunFolder, Stages, dict[str, Any]]]:
    """Open the run folder, and find what an earlier start has left there.

    A run that fails by a mistake of the user leaves nothing behind; one that is interrupted, or
    fails otherwise, can be resumed.

    Args:
        given: the command line.
        default: folder of the run if none was named.
    """
    import shutil

    from mmforget.artifacts.run_folder import LOCK_NAME, RunFolder

    config = {
        key: value
        for key, value in vars(given).items()
        if key not in NOT_OF_THE_RESULT and value not in (None, [], False)
    }
    folder = RunFolder(given.run or default, given.overwrite, given.resume)
    with folder:
        fresh = [entry.name for entry in folder.work.iterdir()] == [LOCK_NAME]
        try:
            yield folder, Stages(folder, config), config
        except (ConfigurationError, MissingFileError, RunExistsError):
            if fresh:
                shutil.rmtree(folder.work / "stages", ignore_errors=True)
            raise


def show(given: Namespace, folder: RunFolder, results: Results, missed: Sequence[str]) -> int:
    """Print the few numbers that matter, and where the rest is.

    Returns:
        The exit code.
    """
    import sys

    from mmforget.cli.pipelines import MISSED
    from mmforget.cli.summary import table

    columns = [
        *(
            (f"{split.replace('/', ' ').replace('_', ' ')}", "replication_rate", split)
            for split in results.data["prompts"]
        ),
        *(
            (f"attack {split.partition('/')[2]}", "attack_embedding", split)
            for split in results.data["prompts"]
            if split.startswith("located/")
        ),
        ("loss rise", "denoising_loss_rise", "ordinary"),
    ]
    print(f"\n{table(results, columns)}\n\n{results.verdict.sentence}\n")
    print(f"report:   {folder.path / 'report.html'}")
    if (folder.path / "artifact").is_dir():
        print(f"artifact: {folder.path / 'artifact'}")
    if results.verdict.outcome == "unattacked" and not results.curves:
        print(f"next:     mmforget memorization attack {given.run or folder.path}")
    for text in missed:
        print(f"mmforget: {text}", file=sys.stderr)
    if not given.no_open and sys.stdout.isatty():
        import webbrowser

        webbrowser.open((folder.path / "report.html").as_uri())
    return MISSED if missed else 0
