"""`mmforget audit`: measure models against a request, whoever made them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmforget.cli.settings import checked_settings, requests_from

HELP = """
usage: mmforget audit MODEL... --against ORIGINAL [options]        (alias: mmforget evaluate)

Measures whether models have forgotten what a request names, and what that did to the rest. The
models need not have been made by mmforget: folders of timm, torchvision or transformers do.
Writes results.json, report.html and report.md into the run folder.

options, all of them also as keys of the YAML file:
  MODEL...                the unlearned models: folders, hub ids, shipped:NAME
  --against ORIGINAL      the model before forgetting
  --retrained MODEL...    models trained from scratch without the forget set
  --held_out MODEL...     such models that are measured as if they were methods
  --controls NAME...      edits that must fail (default: all that fit the model: identity,
                          logit_mask or answer_ban, head_only)
  --data DATA             class name (mmforget list data); --data.OPTION for its options
  --request.classes LIST  what was to be forgotten, such as '[3]'
  --settings.OPTION VALUE what is measured, and how
  --run FOLDER            where the results go (default: runs/audit)
  --overwrite             replace an earlier run of this name
  --title TEXT            title of the report
  -c, --config FILE       YAML file; options after it change single values
  --print_config          print the complete configuration and stop
  --help-all              every option of every part, from the classes themselves

examples:
  mmforget audit runs/sevens/artifact --against shipped:digit_world/classifier_vit \\
      --data DigitWorld --request.classes '[7]'
  mmforget audit mine/ --against original/ --retrained retrained/ --data ImageFolderData \\
      --data.folder pictures --request.classes '[cat]' --run runs/cats
  mmforget audit -c audit.yaml
"""

KEYS = (
    "models",
    "against",
    "retrained",
    "held_out",
    "controls",
    "data",
    "request",
    "settings",
    "run",
    "overwrite",
    "title",
    "seed_everything",
)
LISTS = ("retrained", "held_out", "controls")
REQUIRED = ("models", "against", "data", "request")


def run(args: list[str]) -> int:
    """Audit.

    Raises:
        MMForgetError: the settings are wrong, or a model cannot be loaded.
    """
    settings = checked_settings(
        "audit", args, KEYS, ("overwrite",), REQUIRED, lists=LISTS, positional="models"
    )
    return _run(args, settings)


def _run(args: list[str], settings: dict[str, Any]) -> int:
    from mmforget.artifacts.run_folder import RunFolder, atomic_write
    from mmforget.audit.controls import make_controls
    from mmforget.audit.families import audit_by_family, check_fits
    from mmforget.audit.results import Role
    from mmforget.cli import building
    from mmforget.cli.audit_section import audit_settings_for
    from mmforget.cli.parsing import explained
    from mmforget.report.write import write_report
    from mmforget.run import described

    kind = audit_settings_for(settings)
    parser = audit_parser(kind)
    args = ["--help"] if "help-all" in settings else args
    plain: dict[str, type] = {"settings": kind}
    config = explained(lambda: parser.parse_args(args), settings, plain)
    requests = requests_from(building.parsed_requests(config))
    built = explained(lambda: building.build(parser, config, "data", "settings"), settings, plain)
    data = built.data
    data.request(*requests)
    with RunFolder(config.run, overwrite=config.overwrite) as folder:
        original = described(building.model_folder(config.against), "original", 1)
        models = [replace(original, entry=replace(original.entry, name="original"))]
        compared: tuple[tuple[Role, list[str]], ...] = (
            ("unlearned", config.models),
            ("retrained", config.retrained),
            ("held_out", config.held_out),
        )
        for role, sources in compared:
            for number, source in enumerate(sources, start=1):
                models.append(described(building.model_folder(source), role, number))
        for one in models:
            check_fits(one.model, data)
        models += make_controls(original.model, data, config.controls)
        results = audit_by_family(models, data, requests, built.settings)
        if config.title:
            results.title = config.title
        atomic_write(folder.work / "config.yaml", parser.dump(config, skip_unset=False))
        atomic_write(folder.work / "results.json", results.to_json())
        write_report([results], folder.work)
        path = folder.commit()
    print(results.verdict.sentence)
    print(f"report:  {path / 'report.html'}\nresults: {path}")
    return 0


def audit_parser(kind: type[Any]) -> Any:
    """The full parser; `kind` is the class of the audit's settings."""
    from mmforget.cli import building

    parser = building.new_parser("audit")
    parser.add_argument("models", nargs="+", type=str, help="unlearned models")
    parser.add_argument("--against", type=str, required=True, help="model before forgetting")
    for name, default in (("retrained", []), ("held_out", []), ("controls", None)):
        parser.add_argument(f"--{name}", nargs="*", type=str, default=default)
    building.add_data(parser)
    building.add_request(parser, required=True)
    parser.add_argument("--settings", type=kind, default=kind())
    parser.add_argument("--run", type=str, default="runs/audit", help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--title", type=str, default="", help="title of the report")
    return parser
