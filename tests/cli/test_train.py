"""`fit`, `validate`, `test`, `predict`: a tiny transformer on a few digits."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmforget import ImageClassifier, load_classifier
from mmforget.cli.main import main
from mmforget.models.base import state_hash

TINY = "{img_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}"
MODEL = ("--model", "ImageClassifier", "--model.num_classes", "10", "--model.network_args", TINY)
DATA = (
    *("--data", "DigitWorld", "--data.strokes", "30", "--data.variants", "2"),
    *("--data.batch_size", "16"),
)
QUIET = (
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.accelerator", "cpu"),
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights(tiny_model: ImageClassifier, tmp_path: Path) -> Path:
    """A trained model that somebody else saved."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    tiny_model.save_native(folder)
    return folder


def fit(*more: str) -> int:
    return main(["fit", *MODEL, *DATA, *QUIET, "--trainer.limit_val_batches", "1", *more])


def test_fit_leaves_weights_config_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    assert fit("--trainer.max_epochs", "2", "--run", "runs/a") == 0
    assert sys.argv == before  # the ddp launcher runs it again
    run = Path("runs/a")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "weights"]
    assert not list(Path("runs").glob(".*"))
    assert isinstance(load_classifier(run / "weights"), ImageClassifier)
    cost = json.loads((run / "weights" / "training.json").read_text())["cost"]
    assert cost["sample_passes"] == 3 * 2 * 30 * 2  # 2 drawings of each stroke, 2 epochs
    assert cost["seconds"] > 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] is None
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["model"]["init_args"]["num_classes"] == 10
    assert str(run / "weights") in capsys.readouterr().out

    assert fit("--run", "runs/a") == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    # what was written down reproduces the run
    assert main(["fit", "-c", "runs/a/config.yaml", "--run", "runs/b"]) == 0
    first, second = (load_classifier(f"runs/{name}/weights") for name in "ab")
    assert state_hash(first) == state_hash(second)


def test_fit_the_retrained_model_without_the_forget_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = ("--trainer.max_epochs", "1", "--save", "oracle", "--run", "runs/oracle")
    assert fit("--view", "retain", "--request.classes", "[3]", *steps) == 0
    cost = json.loads(Path("oracle/training.json").read_text())["cost"]
    assert 0 < cost["sample_passes"] < 3 * 30 * 2
    assert not Path("runs/oracle/weights").exists()
    capsys.readouterr()
    assert fit(*steps) == 2
    assert "`--save` is 'oracle', which exists" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_fit_is_resumed_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs", "3", "--run", "whole") == 0

    step = ImageClassifier.training_step

    def interrupted(self: ImageClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", interrupted)
    assert fit("--trainer.max_epochs", "3", "--run", "broken") == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert not Path("broken").exists()
    monkeypatch.setattr(ImageClassifier, "training_step", step)
    assert fit("--trainer.max_epochs", "3", "--run", "broken") == 2  # not by accident
    assert "--resume" in capsys.readouterr().err
    assert fit("--trainer.max_epochs", "3", "--run", "broken", "--resume") == 0
    whole, broken = (load_classifier(f"{name}/weights") for name in ("whole", "broken"))
    assert state_hash(whole) == state_hash(broken)
    costs = [
        json.loads(Path(f"{name}/weights/training.json").read_text())["cost"]["sample_passes"]
        for name in ("whole", "broken")
    ]
    assert costs[0] == costs[1]


@pytest.mark.slow
def test_two_processes_train_like_one() -> None:
    steps = ("--trainer.max_epochs", "1")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    assert fit(*steps, "--run", "one") == 0
    assert fit(*steps, *two, "--run", "two") == 0
    one, both = (load_classifier(f"{name}/weights").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_measure_a_model_of_somebody_else(
    command: str, stage: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [command, "--model", str(weights), *DATA, *QUIET]
    assert main(argv) == 0
    assert f"{stage}/accuracy" in capsys.readouterr().out
    assert main([*argv, "--request.classes", "[three]"]) == 0
    text = capsys.readouterr().out
    assert f"{stage}/accuracy/forget" in text
    assert f"{stage}/accuracy/retain" in text
    assert {path.name for path in Path.cwd().iterdir()} == {"theirs"}


def test_predict(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["predict", "--model", str(weights), *DATA, *QUIET]
    assert main([*argv, "--out", "sub/p.csv"]) == 0
    with Path("sub/p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["id"] for row in rows}) == 30 * 2
    assert {row["label"] for row in rows} <= {"zero", "one", "two", "three", "four", "five"} | {
        "six",
        "seven",
        "eight",
        "nine",
    }
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    assert "60 predictions" in capsys.readouterr().out
    assert main([*argv, "--out", "sub/p.csv"]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert main([*argv, "--out", "q.csv", "--trainer.devices", "2"]) == 2
    assert "runs in one process, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--model.netwrk", "x"],
            "has no option 'netwrk'; did you mean 'network'?",
        ),
        (["--model.lr", "x"], "`model.lr` is 'x'; expected a number"),
        (["--model.library", "tim"], "`model.library` is 'tim'; did you mean 'timm'?"),
        (["--model.class_names", "3"], "`model.class_names` is '3'; expected a list of text"),
        (["--model.network", "vit_tny"], "timm has no model 'vit_tny', did you mean"),
        (["--model.num_classes", "1"], "`num_classes` is 1; it must be at least 2"),
        (
            ["--data.batchsize", "3"],
            "DigitWorld has no option 'batchsize'; did you mean",
        ),
        (["--data.batch_size", "x"], "`data.batch_size` is 'x'; expected a whole number"),
        (["--data.view", "retian"], "`data.view` is 'retian'; did you mean 'retain'?"),
        (["--data.shots", "0"], "`shots` is 0"),
        (
            ["--data", "no.such.Data"],
            "no data module 'no.such.Data'; valid are: ",
        ),
        (
            ["--trainer.max_epoch", "3"],
            "has no option 'max_epoch'; did you mean 'max_epochs'",
        ),
        (
            ["--trainer.max_epochs", "x"],
            "`trainer.max_epochs` is 'x'; expected a whole number",
        ),
        (["--trainer.precision", "17"], "`trainer.precision` is '17'; valid are: '64', '32'"),
        (
            ["--trainer.callbacks", "EarlyStoping"],
            "`trainer.callbacks` is 'EarlyStoping'",
        ),
        (["--request.classes", "[sevn]"], "did you mean 'seven'?"),
        (["--request.classes", "[0,1,2,3,4,5,6,7,8,9]"], "all"),
        (["--model", "no/such/folder"], "there is no 'no/such/folder'"),
        (["--model", "shipped:nothing"], "mmforget ships no model 'nothing'"),
    ],
)
def test_mistakes_are_one_sentence(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "--model", "ImageClassifier", "--data", "DigitWorld", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err
    assert printed.err.startswith("mmforget: ")
    assert printed.err.count("\n") <= 3
    assert not list(Path.cwd().iterdir())


def test_view_needs_a_request_and_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--view", "retain") == 2
    assert "add `--request.classes`" in capsys.readouterr().err
    assert fit("--view", "retian") == 2
    assert "did you mean 'retain'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "test"])
def test_print_config_can_be_read_back(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *MODEL, "--data", "DigitWorld", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["class_path"].endswith("DigitWorld")
    assert config["trainer"]["logger"] is False
    assert not list(Path.cwd().iterdir())


def test_help_all_shows_the_options_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--trainer.max_epochs" in text
    assert "--save" in text


def test_unpickling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"network": torch.nn.Linear(2, 2)}, "evil.pt")
    argv = ["test", *MODEL, "--model.weights", "evil.pt", *DATA, *QUIET]
    assert main(argv) == 2
    assert "evil.pt" in capsys.readouterr().err
