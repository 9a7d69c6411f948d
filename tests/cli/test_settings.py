"""What is found wrong before torch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmforget.cli.main import main
from mmforget.cli.settings import read_settings, requests_from
from mmforget.errors import ConfigurationError, RequestError

KEYS = ("model", "method", "data", "request", "trainer", "run", "resume")


def read(*args: str) -> dict[str, object]:
    return read_settings("forget", args, KEYS, flags=("resume",))


def test_command_line_over_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: SomeModel\ntrainer: {max_epochs: 3, devices: 1}\n")
    found = read(
        "-c", str(file), "--trainer.max_epochs=5", "--model.lr", "1e-3", "--resume", "--run", "r"
    )
    assert found == {
        "model": {"class_path": "SomeModel", "lr": "1e-3"},  # YAML 1.1 reads 1e-3 as a text
        "trainer": {"max_epochs": 5, "devices": 1},
        "resume": True,
        "run": "r",
    }


def test_another_class_drops_the_options_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("method: {class_path: GSLoRA, init_args: {rank: 2}}\n")
    assert read("--config", str(file), "--method", "SSD") == {"method": "SSD"}


def test_lists_and_positionals() -> None:
    found = read_settings(
        "audit",
        ["a", "b", "--retrained", "c", "d", "--run", "r"],
        ("retrained", "run"),
        lists=("retrained",),
        positional="models",
    )
    assert found == {"models": ["a", "b"], "retrained": ["c", "d"], "run": "r"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [1\n", "is not valid YAML: expected ',' or ']'"),
        ("modell: x\n", "`mmforget forget` has no section 'modell'"),
        ("- a\n", "holds a list"),
        ("", "is empty"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_bad_files(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert main(["forget", "-c", str(file)]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") <= 3


def test_a_misspelt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forget.yaml").write_text("model: x\n")
    assert main(["forget", "-c", str(tmp_path / "forgt.yaml")]) == 2
    assert f"did you mean '{tmp_path / 'forget.yaml'}'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--metod", "SSD"], "has no option '--metod'; did you mean '--method'?"),
        (["--meth", "SSD"], "has no option '--meth'; did you mean '--method'?"),
        (["--method"], "`--method` needs a value"),
        (["--method", "--model", "x"], "`--method` needs a value"),
        (["SSD"], "does not expect 'SSD'"),
        (
            ["--method", "NegGradPlu"],
            "there is no method 'NegGradPlu'; did you mean 'NegGradPlus'?",
        ),
        (["--model", "ImageClasifier"], "did you mean 'ImageClassifier'?"),
        (["--data", "DigitWrld"], "did you mean 'DigitWorld'?"),
        (["--data.batch_size", "3"], "`data` needs a class, such as `--data DigitWorld`"),
        (["--method", "SSD"], "needs `--model` and `--data` and `--request.classes`"),
        (["--seed_everything", "x"], "`seed_everything` is 'x'; give a whole number"),
    ],
)
def test_bad_command_lines(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", *argv]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("request_text", "expected"),
    [
        ("{clases: [3]}", "`request` has no field 'clases'; did you mean 'classes'?"),
        ("{classes: 3}", "`request.classes` is '3'; give a list, such as `[3]`"),
        ("{classes: []}", "needs either `classes` or `samples`"),
        ("{classes: [3, 3]}", "names 3 more than once"),
        ("{classes: [3], samples: [1]}", "got both"),
        ("seven", "`request` is 'seven'"),
        ("[]", "`request` is '[]'"),
        ("[seven]", "`request` contains 'seven'"),
        ("{classes: [3], goal: untrainig}", "did you mean 'untraining'?"),
    ],
)
def test_bad_requests(request_text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "x/y", "--method", "SSD", "--data", "DigitWorld", "--request", request_text]
    assert main(["forget", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_one_request_or_several() -> None:
    assert [r.name for r in requests_from({"classes": [3]})] == ["forget-3"]
    two = requests_from([{"classes": [3]}, {"classes": ["eight"], "name": "b"}])
    assert [r.name for r in two] == ["forget-3", "b"]
    with pytest.raises(RequestError):
        requests_from([{"classes": [3]}, {}])


def test_an_option_for_a_list_of_requests(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("request: [{classes: [3]}, {classes: [8]}]\n")
    with pytest.raises(ConfigurationError, match="`request` is a list in the file"):
        read("-c", str(file), "--request.classes", "[7]")
    assert read("-c", str(file), "--request", "[{classes: [7]}]") == {"request": [{"classes": [7]}]}
