"""`mmforget check`: is a configuration fit to run?"""

from __future__ import annotations

import time
from typing import Any

from mmforget.cli import fit, forget
from mmforget.cli.settings import checked_settings, read_settings
from mmforget.errors import ConfigurationError

HELP = """
usage: mmforget check FILE [options]

Reads a configuration of `mmforget forget` or `mmforget fit`, builds everything in it, checks the
requests against the data and takes one training step. Writes nothing.

options:
  FILE        the YAML file; the options of `forget` or `fit` can follow to change single values

examples:
  mmforget check configs/classifier/gs_lora_plus_plus.yaml
  mmforget check configs/classifier/fit-digit_world.yaml
  mmforget check mine.yaml --method.lr 0.1
"""

ONE_STEP = (
    *("--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
)


def run(args: list[str]) -> int:
    """Check a configuration.

    Raises:
        MMForgetError: what is wrong with it.
    """
    if not args or args[0].startswith("-"):
        raise ConfigurationError("`mmforget check` needs a file; see `mmforget check --help`")
    name, args = args[0], ["-c", *args, *ONE_STEP]
    found = read_settings("check", args, {*forget.KEYS, *fit.KEYS}, {*forget.FLAGS, *fit.FLAGS})
    start = time.perf_counter()
    if "method" in found:
        settings = checked_settings("forget", args, forget.KEYS, forget.FLAGS, forget.REQUIRED)
        done = _forget_step(args, settings)
    else:
        settings = checked_settings("fit", args, fit.KEYS, fit.FLAGS)
        done = _fit_step(args, settings)
    print(f"'{name}' is fine: {done}, {time.perf_counter() - start:.1f} s")
    return 0


def _forget_step(args: list[str], settings: dict[str, Any]) -> str:
    from mmforget.cli.forget import prepare

    plan = prepare(args, settings)
    for end in range(1, len(plan.requests) + 1):
        plan.data.request(*plan.requests[:end])
    plan.data.request(plan.requests[0])
    method = plan.method(plan.model)
    if method.view is None:
        method.bind(plan.data)
    else:
        plan.data.view = method.view
        plan.trainers().fit(method, datamodule=plan.data)
    count = len(plan.requests)
    return (
        f"{type(method).__name__} on {type(plan.model).__name__} for {count} "
        f"request{'s' if count > 1 else ''}, one step"
    )


def _fit_step(args: list[str], settings: dict[str, Any]) -> str:
    from mmforget.cli.train import TrainCLI

    cli = TrainCLI("fit", args, settings)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return f"{type(cli.model).__name__}, one step"
