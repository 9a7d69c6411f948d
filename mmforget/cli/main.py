"""The front door of the command line. It imports neither torch nor the module of any command."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "forget two digits in the digit world and open the report"),
    "forget": ("forget", "forget a request, or a sequence of them; save, audit, report"),
    "erase": ("erase", "make a text-to-image pipeline forget concepts, without any file"),
    "memorization": (
        "memorization",
        "find, prune, attack and repair memorized pictures in a text-to-image pipeline",
    ),
    "fit": ("fit", "train a model: the original, or the retrained one without the forget set"),
    "validate": ("validate", "accuracy of a model on the validation data"),
    "test": ("test", "accuracy of a model on the test data"),
    "predict": ("predict", "write the predictions of a model for the test data to a table"),
    "audit": ("audit", "measure any models against a request; writes results and a report"),
    "report": ("report", "turn the results of one or several runs into one page"),
    "ledger": ("ledger", "show what was asked and done, or verify that the files still match"),
    "list": ("listing", "show the models, methods, metrics, attacks or configs there are"),
    "check": ("check", "read a configuration, build everything and take one step"),
    "export": ("export", "copy the weights of a run, also with one request withdrawn"),
}
"""Command: module in `mmforget.cli` and one line for the help. Each module has a text ``HELP`` and
a function ``run(args) -> exit code``, and imports torch only inside `run`. One that has commands of
its own also has ``help_for(args)``."""

ALIASES = {"evaluate": "audit"}

USAGE = """usage: mmforget COMMAND [options]

Make a trained model forget, and prove it.

{commands}

options:
  --help       this text; `mmforget COMMAND --help` explains one command
  --version    the version of mmforget

start with:
  mmforget quickstart
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program name; those of the process if None.

    Returns:
        Exit code: 0 for success, 2 for something that the user can mend, 130 for an interruption,
        143 if the process was told to end.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    # On small machines the busy waiting of OpenMP makes two threads slower than one. It is read
    # when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not args or args[0] in ("--help", "-h", "help"):
        if args[1:]:
            return main([*args[1:], "--help"])
        print(_usage(), end="")
        return 0
    if args[0] == "--version":
        print(f"mmforget {_version()}")
        return 0

    from mmforget.errors import MMForgetError, suggest

    command = ALIASES.get(args[0], args[0])
    if command not in COMMANDS:
        kind = "option" if command.startswith("-") else "command"
        choices = ["--help", "--version"] if kind == "option" else [*COMMANDS, *ALIASES]
        return _fail(f"there is no {kind} '{command}'; {suggest(command, choices)}")
    module = importlib.import_module(f"mmforget.cli.{COMMANDS[command][0]}")
    if any(arg in ("--help", "-h") for arg in args[1:]):
        text = module.help_for(args[1:]) if hasattr(module, "help_for") else module.HELP
        print(text.strip())
        return 0
    try:
        return int(module.run(args[1:]))
    except MMForgetError as error:
        return _fail(str(error))
    except SystemExit as done:
        if type(done) is not SystemExit:  # Lightning's, when it was told to end during a training
            print("mmforget: ended from outside; continue with --resume", file=sys.stderr)
            return 143
        return int(done.code or 0)  # of the parsers, after --help-all and --print_config
    except KeyboardInterrupt:
        print("mmforget: interrupted; continue with --resume", file=sys.stderr)
        return 130


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def _fail(message: str) -> int:
    print(f"mmforget: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return USAGE.format(commands="commands:\n" + "\n".join(lines))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mmforget")
    except PackageNotFoundError:
        return f"(not installed, from {Path(__file__).parents[2]})"


if __name__ == "__main__":
    run()
