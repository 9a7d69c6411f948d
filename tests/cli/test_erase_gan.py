"""`mmforget erase` for generators of GANs: runs, formats, requirements, mistakes; and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmforget
from mmforget.artifacts.ledger import Ledger
from mmforget.artifacts.manifest import Manifest
from mmforget.audit.results import Results
from mmforget.cli.erase import names_gan
from mmforget.cli.erase_gan import FORMATS, HELP, parsed
from mmforget.cli.main import main
from mmforget.cli.requirements import OF_GANS
from mmforget.concept import ConceptSpec
from mmforget.erase_gan import METHODS, find_method, is_gan, run_gan_erasure
from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.gan import ImageGAN
from mmforget.models.gan_files import load_gan
from mmforget.testing.picture_bank import digit_bank

QUICK = ["--set", "pool=64", "--set", "mapper_steps=0", "--set", "lr=0.2", "--set", "bearing=0.5",
         "--set", "batch_size=8", "--set", "retain_batch_size=8", "--steps", "2"]  # fmt: skip
CHECKED = ["--judge", "digit_world", "--guide", "digit_world", "--pictures", "160", "--edits", "0"]
QUIET = ["--quiet", "--no-open"]
SETTINGS = {"pool": 64, "mapper_steps": 0, "batch_size": 8, "retain_batch_size": 8, "bearing": 0.5}
OTHERS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that shows pictures of digits, on the disk."""
    path = tmp_path_factory.mktemp("generators") / "bank"
    path.mkdir()
    digit_bank()[0].save_native(path)
    return path


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """Run a command that must fail, and give its message."""
    assert main(["erase", *map(str, args)]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err.strip().splitlines()[-1]


def test_a_run_leaves_everything_behind(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copied = tmp_path / "seven", tmp_path / "copy"
    code = main(
        ["erase", str(folder), "--concept", "seven", *CHECKED, *QUICK, *QUIET, "--run", str(run),
         "--require", "target<=1", "--require", "same>=1.1", "--title", "Mine", "--save",
         str(copied), "--retrained", str(folder)]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 3, printed.err
    assert "`--require same>=1.1` is not met" in printed.err
    assert "worst kept" in printed.out and f"report:   {run / 'report.html'}" in printed.out
    assert {path.name for path in run.iterdir()} == {
        "artifact", "config.yaml", "report.html", "report.md", "request.json", "results.json",
    }  # fmt: skip
    results = Results.load(run)
    assert results.title == "Mine" and results.data["kind"] == "gan"
    assert {one.name for one in results.by_role("retrained")} == {"retrained"}
    required = {check.name: check.passed for check in results.checks}
    assert required["required: target<=1"] is True and required["required: same>=1.1"] is False
    artifact = run / "artifact"
    assert not Manifest.read(artifact).verify(artifact)
    assert Manifest.read(artifact).method == "TextToUnlearn"
    card = (artifact / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: unconditional-image-generation" in card and "generator of a GAN" in card
    assert yaml.safe_load((run / "config.yaml").read_text())["concept"] == ["seven"]
    before, after = load_gan(folder), load_gan(run)
    assert state_hash(after) != state_hash(before)
    assert state_hash(load_gan(copied)) == state_hash(after)
    entry = Ledger(tmp_path / "ledger.jsonl").entries()[0]
    assert entry["method"] == "TextToUnlearn" and entry["verdict"] == results.verdict.outcome
    exported = tmp_path / "exported"
    assert main(["export", str(run), "--to", str(exported)]) == 0
    assert state_hash(load_gan(exported)) == state_hash(after)
    assert entry["result_hash"] == state_hash(after) and entry["base_hash"] == state_hash(before)


def test_all_formats_lie_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    formats = [part for name in FORMATS for part in ("--format", name)]
    code = main(
        ["erase", str(folder), "--concept", "seven", "--guide", "digit_world", "--no-audit",
         *QUICK, *QUIET, *formats, "--run", str(run)]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    model = load_gan(run)
    state = torch.load(run / "artifact" / "generator.pt", weights_only=True)
    own = model.network.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
    latents = model.draw(3, 0)
    program = torch.export.load(run / "artifact" / "generator.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(latents.codes), model.network(latents.codes), atol=1e-6)
    assert not (run / "results.json").exists()


def test_a_file_gives_the_defaults(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "seven.yaml"
    file.write_text(
        yaml.safe_dump({"concept": [{"target": "seven"}], "judge": "digit_world", "steps": 5})
    )
    given = parsed([str(folder), "--config", str(file), "--steps", "7"])
    assert (given.steps, given.judge, given.concept) == (7, "digit_world", [{"target": "seven"}])


def test_the_shipped_generators_need_no_models_of_the_user() -> None:
    given = parsed(["gan", "--concept", "seven"])
    assert (given.guide, given.judge, given.method) == ("digit_world", "digit_world", METHOD)


METHOD = "text-to-unlearn"


def test_generators_are_told_from_pipelines(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "net.pkl"
    weights.write_bytes(b"x")
    assert is_gan("gan") and is_gan("gan_conditional") and is_gan(folder) and is_gan(weights)
    assert not is_gan("digit_world") and not is_gan("owner/name") and not is_gan(tmp_path)
    assert names_gan(["--quiet", "gan", "--concept", "seven"])
    assert names_gan(["--steps=3", str(folder)])
    assert not names_gan(["digit_world", "--concept", "gan"])
    assert not names_gan(["--concept", "gan", "--run", "gan", "digit_world"])


def test_each_kind_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erase", "gan", "--help"]) == 0
    own = capsys.readouterr().out
    assert own.strip() == HELP.strip() and all(name in own for name in (*METHODS, *FORMATS))
    assert main(["erase", "--help"]) == 0
    other = capsys.readouterr().out
    assert "mmforget erase gan --help" in other and "--guide" not in other
    assert all(len(line) <= 100 for line in HELP.splitlines())


def test_every_requirement_names_a_metric_that_exists() -> None:
    from mmforget.audit.generator_attacks import ATTACKS
    from mmforget.audit.rows import METRICS

    for metric, _ in OF_GANS.values():
        assert metric in METRICS or metric == "attack_"
    assert all(f"attack_{name}" in METRICS for name in ATTACKS)


def test_every_method_can_be_found() -> None:
    for name in METHODS:
        assert find_method(name).__name__ == METHODS[name].partition(":")[2]


# ---- export -------------------------------------------------------------------------------------


def test_a_file_of_weights_becomes_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_gan(folder)
    file, target = tmp_path / "net.pt", tmp_path / "converted"
    torch.save(model.network.state_dict(), file)
    network = "mmforget.testing.picture_bank.PictureBank"
    assert main(["export", str(file), "--to", str(target), "--network", network,
                 "--load", "prior=normal"]) == 0  # fmt: skip
    assert state_hash(load_gan(target)) == state_hash(model)
    capsys.readouterr()
    again = tmp_path / "again"
    assert main(["export", str(file), "--to", str(again), "--without", "seven"]) == 2
    assert "is a file of weights" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", str(again), "--network", network]) == 2
    assert "`--network` is for a file of weights" in capsys.readouterr().err
    assert not again.exists()


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "needs `--concept`"),
        (["--concept", "seven"], "needs `--judge`"),
        (["--concept", "seven", "--judge", "digit_world"], "TextToUnlearn needs a `guide`"),
        (["--concept", "seven", "--methd", "x"], "did you mean '--method'"),
        (["--concept", "seven", "--no-audit", "--method", "uce"], "erases nothing from GANs"),
        (["--concept", "seven", *CHECKED, "--set", "kapa=1"], "did you mean 'kappa'"),
        (["--concept", "seven", *CHECKED, "--format", "pipeline"], "`--format` is 'pipeline'"),
        (["--concept", "seven", *CHECKED, "--require", "taget<=1"], "did you mean 'target'"),
        (["--concept", "seven", *CHECKED, "--require", "attacks<=1"], "needs an attack"),
        (["--concept", "seven", *CHECKED, "--attack", "maper"], "did you mean 'mapper'"),
        (["--concept", "seven", "--judge", "digit_world", "--attack", "mapper"], "needs `--guide`"),
        (["--concept", "giraffe", *CHECKED], "'giraffe', which the judge cannot see"),
        (["--concept", "seven", "--keep", "purple", *CHECKED], "'purple'"),
        (["--concept", "seven", "--concept", "one", "--alternative", "two", *CHECKED],
         "was given for 2 concepts"),
        (["--concept", "seven", *CHECKED, "--method", "class-rerouting", "--steps", "3"],
         "does not train"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    run = tmp_path / "run"
    given = args if "--methd" in args else [*args, "--run", str(run), *QUIET]
    assert message in fails(capsys, folder, *given)
    assert not run.exists()


# ---- in Python ----------------------------------------------------------------------------------


def test_the_call_in_python_gives_a_generator_back() -> None:
    model = digit_bank()[0]
    before = state_hash(model)
    edited = mmforget.erase(
        model, "seven", guide="digit_world", alternatives=OTHERS, steps=1, progress=False,
        **SETTINGS,
    )  # fmt: skip
    assert isinstance(edited, ImageGAN) and not edited.training
    assert state_hash(model) == before != state_hash(edited)
    same = mmforget.erase(
        model, "seven", guide="digit_world", alternatives=OTHERS, steps=1, progress=False,
        copy=False, **SETTINGS,
    )  # fmt: skip
    assert same is model and state_hash(model) == state_hash(edited)


def test_a_folder_in_python_is_loaded(folder: Path) -> None:
    edited = mmforget.erase(
        folder, ["seven"], guide="digit_world", alternatives=OTHERS, steps=1, progress=False,
        **SETTINGS,
    )  # fmt: skip
    assert state_hash(edited) != state_hash(load_gan(folder))


def test_what_belongs_to_pipelines_is_refused(folder: Path) -> None:
    model = digit_bank(1)[0]
    with pytest.raises(ConfigurationError, match="`sequence` and `sampling_steps`"):
        mmforget.erase(model, "seven", sequence=True)
    with pytest.raises(ConfigurationError, match="needs a `guide`"):
        mmforget.erase(model, "seven")
    with pytest.raises(ConfigurationError, match="are for generators of GANs"):
        mmforget.erase("owner/pipeline", "seven", guide="digit_world")
    with pytest.raises(ConfigurationError, match="does not train"):
        run_gan_erasure(model, [ConceptSpec("seven")], "class-rerouting", steps=3)
    with pytest.raises(ConfigurationError, match="erases nothing from GANs"):
        find_method("mmforget.methods.uce.UCE")
