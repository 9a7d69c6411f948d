"""`mmforget memorization`: find, prune, attack and repair memorized pictures in a pipeline."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from mmforget.errors import ConfigurationError, suggest

HELP = """
usage: mmforget memorization find|prune|attack|repair PIPELINE [options]

A text-to-image model that has seen a picture often enough draws it again. These commands find the
prompts that do that, take the memory out of the weights, and test whether it is gone or only out
of reach of its prompts.

  find      score prompts by how memorized they look; needs no training pictures
  prune     locate the weights that memorized prompts use, and set them to zero
  attack    search for embeddings that bring the pictures back, in a pipeline that was treated
  repair    fine-tune: on ordinary pictures, or against that attack as well

`mmforget memorization prune --help` explains one of them. A memory is called removed only if the
attack was run together with its controls.

examples:
  mmforget memorization find planted
  mmforget memorization prune planted --method nemo --attack
  mmforget memorization repair planted --set lr=5e-4 --attack
  mmforget memorization attack runs/nemo-forget-6-memorized-prompts
"""

ACTIONS = ("find", "prune", "attack", "repair")
"""Each is a module here with ``HELP`` and ``run``."""


def help_for(args: Sequence[str]) -> str:
    """The help of the command that is asked about, or of all.

    Args:
        args: what follows ``memorization``.
    """
    named = next((arg for arg in args if arg in ACTIONS), None)
    return str(_module(named).HELP) if named else HELP


def run(args: list[str]) -> int:
    """Run one of the commands.

    Raises:
        ConfigurationError: none or an unknown one was named.
        MMForgetError: see the command.
    """
    if not args or args[0] not in ACTIONS:
        given = args[0] if args else ""
        raise ConfigurationError(
            f"`mmforget memorization` cannot '{given}'; {suggest(given, ACTIONS)}"
            if given
            else f"`mmforget memorization` needs one of {', '.join(ACTIONS)}; see "
            "`mmforget memorization --help`"
        )
    code: int = _module(args[0]).run(args[1:])
    return code


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"mmforget.cli.memorization.{name}")
