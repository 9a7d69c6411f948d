"""The front door: what it prints, how fast, and how it fails."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from mmforget.cli.main import ALIASES, COMMANDS, main

REPOSITORY = Path(__file__).parents[2]

WITHOUT_TORCH = """
import sys, time
from mmforget.artifacts.ledger import Ledger
from mmforget.cli.main import COMMANDS, main
Ledger("ledger.jsonl").append({"method": "SSD"})
calls = [["--help"], ["--version"], ["list", "methods"], ["list", "configs"], ["ledger", "show",
    "ledger.jsonl"], ["ledger", "verify", "ledger.jsonl"], ["report", "nothing"],
    ["forget", "--metod", "x"], ["forget", "-c", "nothing.yaml"]]
calls += [[command, "--help"] for command in COMMANDS]
for call in calls:
    main(call)
    heavy = {"torch", "lightning", "timm", "matplotlib", "jsonargparse"} & set(sys.modules)
    assert not heavy, f"{call} imports {heavy}"
import os
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
print("light")
"""


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and give its message."""
    assert main(list(argv)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert 1 <= printed.err.count("\n") <= 3
    return printed.err


def test_no_torch_before_it_is_needed(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("light\n")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for command, (_, line) in COMMANDS.items():
        assert f"  {command} " in bare
        assert line in bare


@pytest.mark.parametrize("command", [*COMMANDS, *ALIASES])
def test_help_of_a_command_has_three_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mmforget {ALIASES.get(command, command)}")
    examples = text.partition("examples:\n")[2]
    assert examples.count(f"mmforget {ALIASES.get(command, command)}") >= 3
    assert max(map(len, text.splitlines())) <= 100
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_module(command: str) -> None:
    module = importlib.import_module(f"mmforget.cli.{COMMANDS[command][0]}")
    assert callable(module.run)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["frget"], "there is no command 'frget'; did you mean 'forget'?"),
        (["--verson"], "there is no option '--verson'; did you mean '--version'?"),
        (["list"], "`mmforget list` needs to know of what"),
        (["list", "method"], "did you mean 'methods'?"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "a", "--ouut", "b"], "`mmforget report` has no option '--ouut'; did you mean"),
        (["report", "--ou", "b", "a"], "did you mean '--out'?"),  # no abbreviations
        (["report", "no/run"], "no results at 'no/run'"),
        (["ledger", "shw"], "did you mean 'show'?"),
        (["ledger", "show", "none.jsonl"], "there is no ledger 'none.jsonl'"),
        (["ledger", "show", "a", "b"], "does not expect 'b'"),
        (["export", "a"], "the following arguments are required: --to"),
        (["export", "a", "--to", "."], "`--to` is '.', which exists"),
        (["check"], "`mmforget check` needs a file"),
    ],
)
def test_errors_of_light_commands(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(capsys, *argv)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmforget ")


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mmforget.cli import listing

    def interrupted(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "run", interrupted)
    assert main(["list", "methods"]) == 130
    assert capsys.readouterr().err == "mmforget: interrupted; continue with --resume\n"


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmforget.cli import listing

    def broken(args: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(listing, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["list", "methods"])


def test_the_thread_policy_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    main(["--version"])
    import os

    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_process_that_is_told_to_end_does_not_report_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmforget.cli import listing

    class SIGTERMException(SystemExit):
        """As Lightning raises it when it trains."""

    def ended(args: list[str]) -> int:
        raise SIGTERMException

    monkeypatch.setattr(listing, "run", ended)
    assert main(["list", "methods"]) == 143
    assert "continue with --resume" in capsys.readouterr().err
