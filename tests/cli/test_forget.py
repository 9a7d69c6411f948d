"""`forget`, and what can be done with the run: `report`, `ledger`, `export`, `audit`, `check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from mmforget import ImageClassifier, load_classifier
from mmforget.audit.results import Results
from mmforget.cli.main import main
from mmforget.models.base import state_hash

REPOSITORY = Path(__file__).parents[2]
DATA = (
    *("--data", "DigitWorld", "--data.strokes", "60", "--data.variants", "2"),
    *("--data.eval_variants", "1", "--data.batch_size", "16"),
)
TRAINER = (
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.accelerator", "cpu"),
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def original(tiny_model: ImageClassifier, tmp_path: Path) -> Path:
    """The trained model as a native folder."""
    folder = tmp_path / "original"
    folder.mkdir()
    tiny_model.save_native(folder)
    return folder


def forget(original: Path, method: str, *more: str) -> int:
    common = ("--model", str(original), "--method", method, *DATA, *TRAINER)
    return main(["forget", *common, *more])


@pytest.fixture(scope="module")
def sequence(
    trained_tiny_model: ImageClassifier, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A finished run of two requests without audit."""
    folder = tmp_path_factory.mktemp("sequence")
    (folder / "original").mkdir()
    trained_tiny_model.save_native(folder / "original")
    requests = "[{classes: [3]}, {classes: [eight], reason: asked for}]"
    run = folder / "runs" / "two"
    argv = ("--request", requests, "--run", str(run), "--audit.enabled", "false")
    assert forget(folder / "original", "GSLoRA", *argv) == 0
    yield run


def test_a_sequence_leaves_a_complete_run(sequence: Path) -> None:
    names = {path.name for path in sequence.iterdir()}
    assert {"artifact", "config.yaml", "request.json"} <= names
    config = yaml.safe_load((sequence / "config.yaml").read_text())
    assert config["method"]["class_path"].endswith("GSLoRA")
    assert config["method"]["init_args"]["rank"] == 8  # complete, with defaults
    asked = json.loads((sequence / "request.json").read_text())["requests"]
    assert [request["classes"] for request in asked] == [[3], ["eight"]]
    assert isinstance(load_classifier(sequence / "artifact"), ImageClassifier)


def test_ledger(sequence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = sequence.parent / "ledger.jsonl"
    assert main(["ledger", "show", str(ledger)]) == 0
    assert "GSLoRA" in capsys.readouterr().out
    assert main(["ledger", "verify", str(ledger)]) == 0
    assert "intact: 1 entries" in capsys.readouterr().out
    copy = sequence.parent / "altered.jsonl"
    copy.write_text(ledger.read_text().replace("GSLoRA", "SSD"))
    assert main(["ledger", "verify", str(copy)]) == 1
    assert "line 1 was altered" in capsys.readouterr().out


def test_export_with_and_without_a_request(
    sequence: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(sequence / "artifact"), "--to", "all"]) == 0
    assert (
        main(["export", str(sequence / "artifact"), "--to", "some", "--without", "forget-3"]) == 0
    )
    unlearned = load_classifier(sequence / "artifact")
    assert state_hash(load_classifier("all")) == state_hash(unlearned)
    remembers = load_classifier("some")
    changed = [
        name
        for name, value in remembers.network.state_dict().items()
        if not torch.equal(value, unlearned.network.state_dict()[name])
    ]
    assert changed
    assert all("mlp" in name for name in changed)
    capsys.readouterr()
    assert main(["export", str(sequence), "--to", "none", "--without", "forget-4"]) == 2
    assert "there is no request 'forget-4'; did you mean 'forget-" in capsys.readouterr().err
    assert not Path("none").exists()


def test_export_refuses_changed_files(sequence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(sequence / "artifact", "copy")
    with Path("copy/README.md").open("a") as file:
        file.write("by the way\n")
    assert main(["export", "copy", "--to", "out"]) == 2
    assert "'README.md' has changed" in capsys.readouterr().err


@pytest.mark.slow
def test_forget_audits_and_reports(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--audit.replicates", "100", "--audit.random_inits", "1")
    argv = ("--request.classes", "[3]", "--run", "runs/a", "--title", "Threes", *quick)
    assert forget(original, "NegGradPlus", *argv) == 0
    results = Results.load("runs/a")
    printed = capsys.readouterr().out
    assert results.verdict.sentence in printed
    assert "report.html" in printed
    assert results.title == "Threes"
    assert {"original", "unlearned", "control"} <= {entry.role for entry in results.models}
    assert Path("runs/a/report.html").is_file()

    assert main(["report", "runs/a", "--out", "page"]) == 0
    assert results.verdict.sentence in capsys.readouterr().out
    assert Path("page/report.html").is_file()
    assert main(["report", "runs/a", "runs/a"]) == 2
    assert "needs `--out FOLDER`" in capsys.readouterr().err


@pytest.mark.slow
def test_audit_models_that_mmforget_did_not_make(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        *("audit", str(original), "--against", str(original), "--retrained", str(original)),
        *("--controls", "identity", "--run", "runs/audit", "--request.classes", "[3]"),
        *("--settings.replicates", "100", "--settings.random_inits", "1", *DATA),
    ]
    assert main(argv) == 0
    results = Results.load("runs/audit")
    assert results.verdict.sentence in capsys.readouterr().out
    roles = [entry.role for entry in results.models]
    assert roles[:4] == ["original", "unlearned", "retrained", "control"]
    assert Path("runs/audit/report.html").is_file()
    assert main(argv) == 2
    assert "runs/audit' exists" in capsys.readouterr().err
    # the same from a file
    assert main(["audit", "-c", "runs/audit/config.yaml", "--run", "runs/again"]) == 0
    again = [row for row in Results.load("runs/again").metrics if row.family != "cost"]
    assert again == [row for row in results.metrics if row.family != "cost"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--against", "a"], "needs `MODEL...` and `--data` and `--request.classes`"),
        (["a", "--aginst", "b"], "has no option '--aginst'; did you mean '--against'?"),
        (["a", "--data", "DigitWrld"], "did you mean 'DigitWorld'?"),
    ],
)
def test_mistakes_of_audit(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("audit", "evaluate"):
        assert main([command, *argv]) == 2
        assert expected in capsys.readouterr().err


def test_audit_of_a_missing_model(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["audit", "nothing", "--against", str(original), "--request.classes", "[3]", *DATA]
    assert main(argv) == 2
    assert "there is no 'nothing'" in capsys.readouterr().err
    assert not Path("runs/audit").exists()
    assert main([*argv, "--settings.replicate", "3"]) == 2
    assert "`settings` has no option 'replicate'; did you mean 'replicates'?" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--method.lrr", "3"], "NegGradPlus has no option 'lrr'; did you mean 'lr'?"),
        (["--method.lr", "x"], "`method.lr` is 'x'; expected a number"),
        (["--method.optimizer", "sdg"], "`method.optimizer` is 'sdg'; did you mean 'sgd'?"),
        (["--method.model", "x"], "NegGradPlus has no option 'model'"),
        (
            ["--audit.batchsize", "3"],
            "has no option 'batchsize'; did you mean 'batch_size'?",
        ),
        (["--audit.batch_size", "0"], "`audit.batch_size` is 0"),
        (["--request.classes", "[eleven]"], "did you mean 'seven'?"),
        (["--request", "[{classes: [3]}, {classes: [3]}]"], "3"),
        (["--request.samples", "[1]", "--request.classes", "[3]"], "got both"),
        (["--trainer.max_epochs", "many"], "`trainer.max_epochs` is 'many'"),
        (["--audit.retrained", "[nothing]"], "there is no 'nothing'"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    argv: list[str], expected: str, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = () if "--request" in argv else ("--request.classes", "[3]")
    assert forget(original, "NegGradPlus", *request, *argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err
    assert printed.err.count("\n") <= 3
    assert {path.name for path in Path.cwd().iterdir() if path.name != "runs"} == {"original"}
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_print_config_of_a_shipped_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    file = REPOSITORY / "configs" / "classifier" / "gs_lora_plus_plus.yaml"
    argv = ["forget", "-c", str(file), "--method.rank", "2", "--print_config"]
    assert main(argv) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["method"]["init_args"]["rank"] == 2
    assert [request["classes"] for request in config["request"]] == [["three"], ["seven"]]
    assert config["trainer"]["use_distributed_sampler"] is False


FORGET_CONFIGS = [
    path
    for path in sorted((REPOSITORY / "configs" / "classifier").glob("*.yaml"))
    if "method:" in path.read_text()
]


@pytest.mark.parametrize("path", FORGET_CONFIGS, ids=lambda path: path.stem)
def test_configurations_take_a_step(
    path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the tiny model and few digits in place of the real ones."""
    assert main(["check", str(path), "--model", str(original), *DATA]) == 0
    assert f"'{path}' is fine" in capsys.readouterr().out
    assert {entry.name for entry in Path.cwd().iterdir()} == {"original"}


def test_check_finds_what_is_wrong(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        f"model: {original}\nmethod: SSD\ndata: DigitWorld\n"
        "request: [{classes: [3]}, {classes: [3]}]\n"
    )
    assert main(["check", "mine.yaml"]) == 2
    assert "3" in capsys.readouterr().err
    assert main(["check", "mine.yaml", "--request", "{classes: [3]}", *DATA]) == 0
    assert "SSD on ImageClassifier for 1 request, one step" in capsys.readouterr().out
    assert main(["check", "mine.yaml", "--metod", "SSD"]) == 2
    assert "did you mean '--method'?" in capsys.readouterr().err
