"""`mmforget erase`: runs, requirements, formats, and every mistake in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmforget
from mmforget.artifacts.ledger import Ledger
from mmforget.artifacts.manifest import Manifest
from mmforget.audit.results import MetricResult, ModelEntry, Results, Verdict
from mmforget.audit.rows import METRICS
from mmforget.cli.erase import HELP, parsed, settings_of
from mmforget.cli.main import main
from mmforget.cli.requirements import REQUIRABLE, Requirement
from mmforget.erase import METHODS
from mmforget.errors import ConfigurationError
from mmforget.models.diffusion import load_generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

RED = ["digit_world", "--concept", "red", "--synonym", "scarlet", "--keep", "green", "--keep",
       "blue", "--pictures", "4", "--sampling-steps", "3", "--quiet", "--no-open"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline on the disk."""
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny_pipeline("sd").save_pretrained(path)
    return path


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """Run a command that must fail, and give its message."""
    assert main(["erase", *map(str, args)]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    # what libraries say while they load is theirs; the last line is ours
    return printed.err.strip().splitlines()[-1]


def test_a_run_leaves_everything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "red"
    code = main(["erase", *RED, "--run", str(run), "--require", "target<=0.5", "--title", "Mine"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "%" not in printed.err  # no progress bar
    assert "unlearned" in printed.out and "scarlet" in printed.out
    assert f"report:   {run / 'report.html'}" in printed.out
    assert {path.name for path in run.iterdir()} == {
        "artifact", "config.yaml", "report.html", "report.md", "request.json", "results.json",
    }  # fmt: skip
    results = Results.load(run)
    assert results.title == "Mine"
    assert {check.name: check.passed for check in results.checks}["required: target<=0.5"] is True
    assert results.get("edit_bytes", "unlearned").value
    assert results.by_role("unlearned")[0].method == "UCE"
    manifest = Manifest.read(run / "artifact")
    assert manifest.verify(run / "artifact") == []
    assert (manifest.method, manifest.base_model) == ("UCE", "digit_world")
    assert "A text-to-image model" in (run / "artifact" / "README.md").read_text()
    assert list((run / "artifact" / "adapters").glob("*/*.safetensors"))
    request = json.loads((run / "request.json").read_text())["requests"][0]
    assert request["concepts"][0]["synonyms"] == ["scarlet"]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.verify(tmp_path) == []
    assert ledger.entries()[0]["verdict"] == results.verdict.outcome
    load_generator(run / "artifact")
    # the same again from its own configuration, with another choice
    again = tmp_path / "again"
    code = main(["erase", "--config", str(run / "config.yaml"), "--run", str(again), "--no-audit",
                 "--format", "lora", "--require", "target<=1"])  # fmt: skip
    assert code == 2  # a requirement without an audit
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["require"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    code = main(["erase", "--config", str(tmp_path / "mine.yaml"), "--run", str(again), "--quiet",
                 "--no-audit", "--format", "lora", "--save", str(tmp_path / "lora")])  # fmt: skip
    assert code == 0
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert not (again / "artifact" / "model_index.json").exists()
    assert not (again / "results.json").exists()
    assert Ledger(tmp_path / "ledger.jsonl").entries()[1]["verdict"] == "not audited"


def test_a_missed_requirement_is_code_3(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["erase", *RED, "--run", str(tmp_path / "r"), "--require", "preserved_drop<=-1",
                 "--require", "target<=1"])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 3
    assert "`--require preserved_drop<=-1` is not met: preserved_drop is " in printed.err
    assert "target" not in printed.err
    assert (tmp_path / "r" / "report.html").is_file()


def test_a_method_that_trains_from_the_shell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "esd"
    args = ["erase", str(folder), "--concept", "cat", "--keep", "dog", "--template", "{}",
            "--method", "esd", "--steps", "2", "--set", "steps=2", "--set", "trajectories=1",
            "--set", "retain_trajectories=1", "--set", "lr=1e-3", "--device", "cpu",
            "--no-audit", "--run", str(run), "--quiet"]  # fmt: skip
    assert main(args) == 0
    manifest = Manifest.read(run / "artifact")
    assert manifest.settings == {
        "steps": 2, "trajectories": 1, "retain_trajectories": 1, "lr": 0.001,
    }  # fmt: skip
    before = tiny_pipeline("sd").unet.state_dict()
    after = load_generator(run / "artifact").network.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # whole weights are no LoRA, and nothing half-written stays behind
    assert main([*args[:-2], str(tmp_path / "x"), "--quiet", "--format", "lora"]) == 2
    assert "add `--rank N`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "x" in path.name] == []
    # an edit is taken up by a later run, on the pipeline it was made for only
    edit = next((run / "artifact" / "adapters").iterdir())
    later = ["erase", str(folder), "--concept", "tree", "--keep", "dog", "--after", str(edit),
             "--no-audit", "--device", "cpu", "--quiet", "--run",
             str(tmp_path / "later")]  # fmt: skip
    assert main(later) == 0
    tiny_pipeline("sd", seed=1).save_pretrained(tmp_path / "other")
    later[1], later[-1] = str(tmp_path / "other"), str(tmp_path / "wrong")
    assert main(later) == 2
    assert "another base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "`mmforget erase` needs PIPELINE"),
        (["digit_world"], "needs `--concept`"),
        (["digit_world", "--concpt", "x"], "has no option '--concpt'; did you mean '--concept'?"),
        (["--concept"], "expected one argument"),
        (["--method", "ucee"], "`method` is 'ucee'; did you mean 'uce'?"),
        (["--kind", "objet"], "`concept.kind` is 'objet', did you mean 'object'?"),
        (["--anchor", "seven"], "`concept.anchor` is 'seven', which contains the erased 'seven'"),
        (["--keep", "seven"], "a concept is either erased or preserved"),
        (["--keep", "one", "--keep", "One"], "`concept.preserve` has 'One' twice"),
        (["--synonym", "seven"], "`concept.synonyms` has 'seven', which is also to be erased"),
        (["--template", "digit"], "a template needs exactly one '{}'"),
        (["--keep", "eigth"], "`preserve` has 'eigth', which the judge cannot see; did you mean"),
        (["--set", "scope"], "`--set` is 'scope'; write NAME=VALUE"),
        (["--set", "scop=all"], "UCE has no setting 'scop'; did you mean 'scope'?"),
        (["--set", "scope=all", "--set", "scope=all"], "gives 'scope' twice"),
        (["--steps", "5"], "`steps` is 5, but UCE does not train"),
        (["--require", "target"], "write a name, a sign and a number"),
        (["--require", "tagret<=0.1"], "names 'tagret'; did you mean 'target'?"),
        (["--require", "attacks<=0.1"], "needs an attack; add `--attack NAME`"),
        (["--attack", "promts"], "`audit.attacks` has 'promts'; did you mean 'prompts'?"),
        (["--format", "loar"], "`--format` is 'loar', did you mean 'lora'?"),
        (["--rank", "4"], "`--rank` belongs to `--format lora`"),
        (["--save", "."], "`--save` is '.', which exists"),
        (["--dtype", "float61"], "`--dtype` is 'float61', did you mean 'float16'?"),
        (["--dtype", "float16", "--device", "cpu"], "the CPU needs float32"),
        (["--judge", "no/judge"], "the judge 'no/judge' has no training.json"),
        (["--after", "no/edit"], "no/edit"),
        (["--config", "none.yaml"], "there is no configuration file 'none.yaml'"),
        (["--method", "sld", "--format", "lora", "--no-audit"], "changes no weights"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes(
    args: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = args if not args or args[0] == "digit_world" else [
        "digit_world", "--concept", "seven", *args
    ]  # fmt: skip
    message = fails(capsys, *given, *(["--quiet"] if given else []))
    assert text in message
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []  # nothing was begun


def test_pipelines_that_are_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--concept", "cat", "--no-audit", "--run", tmp_path / "run"]
    (tmp_path / "empty").mkdir()
    assert "is no diffusers pipeline" in fails(capsys, tmp_path / "empty", *rest)
    assert "is no diffusers pipeline" in fails(capsys, "./nothing", *rest)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    assert "holds a DDPMPipeline, which is no supported text-to-image" in fails(
        capsys, other, *rest
    )
    broken = tmp_path / "broken"
    tiny_pipeline("sd").save_pretrained(broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in fails(capsys, broken, *rest)
    assert "tokens, the text encoder reads 16" in fails(
        capsys, folder, "--concept", "a cat " * 12, "--no-audit"
    )
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    args = [folder, "--concept", "cat", "--keep", "dog", "--no-audit", "--quiet", "--run",
            tmp_path / "mine"]  # fmt: skip
    assert "exists; choose another name" in fails(capsys, *args)
    assert "was not written by mmforget" in fails(capsys, *args, "--overwrite")


def test_configuration_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "pipeline: digit_world\nconcept: [{target: red, synonyms: [scarlet]}, seven]\n"
        "keep: [one]\nsampling-steps: 7\n"
    )
    given = parsed(["--config", str(file), "--keep", "two"])
    assert given.pipeline == "digit_world" and given.sampling_steps == 7
    assert given.keep == ["one", "two"]
    from mmforget.cli.erase import concepts_of

    red, seven = concepts_of(given)
    assert red.preserve == seven.preserve == ("one", "two")
    for text, problem in (
        ("keap: [one]", "has the key 'keap'; did you mean 'keep'?"),
        ("keep: one", "give a list"),
        ("seed: [1]", "give a single value"),
        ("- 1", "holds no mapping"),
        ("a: [", "is not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=problem.replace("[", r"\[").split("?")[0]):
            parsed(["--config", str(file)])


def test_settings_are_read_as_values() -> None:
    found = settings_of(["a=1e-4", "b=x", "c=[1, 2]", "d=null", "e=0.5", "f=true", "g=a=b"])
    assert found == {"a": 1e-4, "b": "x", "c": [1, 2], "d": None, "e": 0.5, "f": True, "g": "a=b"}


def measured(**values: float | None) -> Results:
    """Results with some rows of one unlearned model."""
    rows = [
        MetricResult("target_rate", "unlearned", "forgetting", value, "lower", f"target/{name}")
        for name, value in values.items()
    ]
    return Results(
        "t", "concept_removal", [], {}, [ModelEntry("unlearned", "unlearned")], rows, [],
        Verdict("forgotten", ""),
    )  # fmt: skip


def test_requirements_take_the_worst_value() -> None:
    results = measured(red=0.2, seven=0.05)
    at_most, at_least = Requirement.parse("target <= 10%"), Requirement.parse("target>=0.1")
    assert (at_most.measured(results), at_least.measured(results)) == (0.2, 0.05)
    assert str(at_most) == "target<=0.1"
    assert not at_most.holds(0.2) and at_most.holds(0.1)
    assert not Requirement.parse("target<0.1").holds(0.1)
    assert Requirement.parse("target>0.1").holds(0.2)
    # what was not measured meets nothing
    assert at_most.measured(measured(red=0.0, seven=None)) is None
    assert not at_most.holds(None) and at_most.measured(measured()) is None


def test_what_can_be_required_is_measured() -> None:
    for metric, _ in REQUIRABLE.values():
        assert any(name.startswith(metric) for name in METRICS)


def test_the_help_names_methods_and_attacks() -> None:
    from mmforget.audit.concept_attacks import ATTACKS

    for name in (*METHODS, *ATTACKS, *REQUIRABLE):
        assert name in HELP or name in ("together", "other_facts", "preserved_worst", "clip_score",
                                        "preserved_worst_drop", "kid")  # fmt: skip
    assert mmforget.erase is not None
