"""`mmforget memorization`: what the commands leave behind, resuming, and every mistake."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmforget.artifacts.ledger import Ledger
from mmforget.artifacts.manifest import Manifest
from mmforget.audit.results import MetricResult, ModelEntry, Results, Verdict
from mmforget.audit.rows import METRICS
from mmforget.cli.main import main
from mmforget.cli.memorization import ACTIONS, find, prune, repair
from mmforget.cli.memorization.common import find_class
from mmforget.cli.memorization.find import threshold
from mmforget.cli.requirements import OF_MEMORIES, Requirement
from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.memorized_files import load_memorized, save_memorized
from mmforget.models.diffusion import load_generator
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

QUICK = ["--pictures", "1", "--ordinary", "2", "--sampling-steps", "2", "--detection", "0",
         "--examples", "1", "--quiet", "--no-open", "--device", "cpu"]  # fmt: skip
SUBSPACE = ["--set", "first_steps=1", "--set", "ratio=0.1", "--control", "random"]
ATTACK = ["--attack-steps", "0", "--attack-steps", "1", "--attack-start", "random"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline on the disk."""
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny_pipeline("sd").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def memories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memorized set on the disk; the tiny model knows nothing of it."""
    draw = generator(0, "test pictures")
    pictures = torch.rand(12, 3, 16, 16, generator=draw)
    memorized = MemorizedSet(
        tuple(
            MemorizedPrompt(text, (f"p{row}",), "verbatim")
            for row, text in enumerate(("a red cat", "a blue dog", "van gogh tree", "a horse"))
        ),
        {f"p{row}": pictures[row] for row in range(4)},
        retain=Captioned(("a tree", "a house", "a car"), pictures[4:7]),
        test=Captioned(("a street", "a banana"), pictures[7:9]),
        controls=pictures[9:],
    )
    return save_memorized(memorized, tmp_path_factory.mktemp("memories") / "set")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pruned(
    folder: Path, memories: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The run folder of `prune`."""
    run = tmp_path_factory.mktemp("runs") / "pruned"
    args = ["memorization", "prune", str(folder), "--memorized", str(memories), *SUBSPACE, *QUICK]
    assert main([*args, "--run", str(run), "--title", "Mine"]) == 0
    yield run


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """Run a command that must fail, and give its message."""
    assert main(["memorization", *map(str, args)]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err.strip().splitlines()[-1]


# ---- prune ---------------------------------------------------------------------------------------


def test_prune_leaves_everything_behind(pruned: Path, folder: Path) -> None:
    assert {path.name for path in pruned.iterdir()} == {
        "artifact", "config.yaml", "report.html", "report.md", "request.json", "results.json",
    }  # fmt: skip
    results = Results.load(pruned)
    assert results.title == "Mine"
    assert [model.name for model in results.models] == [
        "original", "pruned", "random mask", "identity, other seeds",
    ]  # fmt: skip
    # this model never saw the pictures, so that nothing can be said of them
    assert results.verdict.outcome == "not_discriminative"
    assert results.data["prompts"] == {"located/verbatim": 2, "held_out/verbatim": 2}
    entry = results.by_role("unlearned")[0]
    assert entry.method == "SubspacePruning" and entry.cost["sample_passes"] > 0
    artifact = pruned / "artifact"
    manifest = Manifest.read(artifact)
    assert manifest.verify(artifact) == []
    assert (manifest.method, manifest.settings["ratio"]) == ("SubspacePruning", 0.1)
    mask = WeightMask.load(artifact / "mmforget_mask.safetensors")
    before, after = load_generator(folder), load_generator(artifact)
    for name, chosen in mask.masks.items():
        weight = after.network.get_parameter(name)
        assert chosen.any() and bool((weight[chosen] == 0).all())
        assert torch.equal(weight[~chosen], before.network.get_parameter(name)[~chosen])
    assert list((artifact / "adapters").glob("*/mmforget_edit.safetensors"))
    ledger = Ledger(pruned.parent / "ledger.jsonl")
    assert ledger.verify(pruned.parent) == []
    assert ledger.entries()[0]["verdict"] == "not_discriminative"
    request = json.loads((pruned / "request.json").read_text())["requests"][0]
    assert {one["kind"] for one in request["concepts"]} == {"memorized"}


def test_a_missed_requirement_is_code_3(
    folder: Path, memories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["memorization", "prune", str(folder), "--memorized", str(memories), *SUBSPACE[:4],
                 *QUICK, "--control", "none", "--run", "r", "--require", "loss_rise<=-1",
                 "--require", "copies<=1", "--share", "1"])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 3
    assert "`--require loss_rise<=-1` is not met: loss_rise is " in printed.err
    assert "copies" not in printed.err
    results = Results.load(Path("r"))
    assert not [model for model in results.models if "mask" in model.name]
    assert list(results.data["prompts"]) == ["located/verbatim"]


def test_a_stopped_run_goes_on(
    folder: Path,
    memories: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mmforget.audit.memorization as audit
    import mmforget.methods.pruning as pruning

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    args = ["memorization", "prune", str(folder), "--memorized", str(memories), *SUBSPACE, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(audit, "audit_memorization", interrupted)
        assert main([*args, "--run", "r"]) == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert not Path("r").exists()
    assert main([*args, "--run", "r"]) == 2  # neither started anew nor taken for finished
    other = [*args, "--run", "r", "--resume", "--seed", "1"]
    assert main(other) == 2
    assert "was started with seed = None, now it is 1" in capsys.readouterr().err
    located = pruning.PruningMethod.locate_mask

    def only_controls(method: Any) -> Any:
        assert method.control, "what was located before must not be located again"
        return located(method)

    monkeypatch.setattr(pruning.PruningMethod, "locate_mask", only_controls)
    assert main([*args, "--run", "r", "--resume"]) == 0
    assert not (Path("r") / "stages").exists()
    assert Results.load(Path("r")).by_role("unlearned")[0].details["removed"] > 0


# ---- attack --------------------------------------------------------------------------------------


def test_attack_takes_up_a_run(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["memorization", "attack", str(pruned), *ATTACK, *QUICK, "--run", "a"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    results = Results.load(Path("a"))
    assert [model.role for model in results.models] == ["original", "unlearned", "control"]
    assert results.models[0].hash != results.models[1].hash
    rows = results.curves["embedding_attack"]
    assert {row["model"] for row in rows} == {"original", "treated"}
    assert {row["group"] for row in rows} >= {"memorized", "held_out", "control"}
    assert {row["budget"] for row in rows} == {0, 1}
    assert results.get("attack_embedding", "treated", "located/verbatim").value is not None
    # which mask it was is known from the run
    assert "density" in results.by_role("unlearned")[0].details
    config = yaml.safe_load((Path("a") / "config.yaml").read_text())
    assert config["memorized"].endswith("set") and config["against"].endswith("tiny")
    entry = Ledger(Path("ledger.jsonl")).entries()[0]
    assert (entry["method"], entry["verdict"]) == ("attack", results.verdict.outcome)


def test_attack_goes_on_after_a_stop(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmforget.attacks import embedding_inversion

    attack, calls = embedding_inversion.embedding_attack, list[int]()

    def second_fails(*given: Any, **further: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack(*given, **further)

    monkeypatch.setattr(embedding_inversion, "embedding_attack", second_fails)
    args = ["memorization", "attack", str(pruned), *ATTACK, *QUICK, "--run", "a"]
    assert main(args) == 130
    assert main([*args, "--resume"]) == 0
    assert len(calls) == 3  # that of the original was not repeated
    capsys.readouterr()
    assert "the attack must" not in fails(capsys, "attack", pruned, "--share", "0")


# ---- repair --------------------------------------------------------------------------------------


def test_repair_trains_and_can_be_stopped(
    folder: Path,
    memories: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mmforget.audit.memorization as audit

    args = ["memorization", "repair", str(folder), "--memorized", str(memories), "--method",
            "retain", "--steps", "2", "--set", "lr=1e-3", *QUICK, "--run", "r"]  # fmt: skip

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(audit, "audit_memorization", interrupted)
        assert main(args) == 130
    assert (Path(".r.partial") / "stages" / "checkpoints" / "last.ckpt").is_file()
    assert main([*args, "--resume"]) == 0, capsys.readouterr().err
    straight = [*args[:-1], "straight"]
    assert main(straight) == 0
    networks = [load_generator(Path(run) / "artifact").network for run in ("r", "straight")]
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(one, other)
    start = load_generator(folder).network.state_dict()
    assert any(not torch.equal(value, start[n]) for n, value in networks[0].state_dict().items())
    entry = Results.load(Path("r")).by_role("unlearned")[0]
    assert entry.method == "RetainFineTuning" and entry.access["forget_inputs"] is False


def test_repair_after_pruning_keeps_the_mask(pruned: Path) -> None:
    args = ["memorization", "repair", str(pruned), "--method", "perp", "--steps", "1", *QUICK]
    assert main([*args, "--run", "r"]) == 0
    model = load_generator(Path("r") / "artifact")
    mask = WeightMask.load(pruned / "artifact")
    for name, chosen in mask.masks.items():
        assert bool((model.network.get_parameter(name)[chosen] == 0).all())
    results = Results.load(Path("r"))
    assert results.by_role("original")[0].source.endswith("tiny")


# ---- find ----------------------------------------------------------------------------------------


def test_find_scores_and_lists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a red cat\na blue dog\na red cat\n")
    Path("ordinary.txt").write_text("a house\na street\na car\n")
    args = ["memorization", "find", str(folder), "--prompts", "prompts.txt", "--ordinary",
            "ordinary.txt", "--sampling-steps", "2", "--set", "n=1", "--quiet", "--tokens", "1",
            "--quantile", "0.5", "--run", "f", "--device", "cpu"]  # fmt: skip
    assert main(args) == 0
    assert "prompts look memorized" in capsys.readouterr().out
    rows = list(csv.DictReader((Path("f") / "scores.csv").open()))
    assert [row["list"] for row in rows] == ["candidate"] * 2 + ["ordinary"] * 3
    limit = sorted(float(row["score"]) for row in rows[2:])[1]
    for row in rows[:2]:
        assert (row["memorized"] == "True") == (float(row["score"]) > limit)
    summary = json.loads((Path("f") / "summary.json").read_text())
    assert summary["threshold"] == pytest.approx(limit) and len(summary["tokens"]) == 1
    if summary["found"]:
        assert len(load_memorized(Path("f") / "found.csv")) == summary["found"]


def test_find_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("mmforget.detection.noise_magnitude")
    Path("p.txt").write_text("a red cat\na blue dog\n")
    Path("o.txt").write_text("a house\na car\n")
    args = ["memorization", "find", str(folder), "--prompts", "p.txt", "--ordinary", "o.txt",
            "--sampling-steps", "2", "--set", "n=1", "--quiet", "--run", "f"]  # fmt: skip
    detect, asked = module.noise_magnitude, list[str]()

    def third_fails(model: Any, prompts: list[str], **given: Any) -> Any:
        asked.extend(prompts)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return detect(model, prompts, **given)

    # the detector's own signature says which settings it has
    third_fails.__signature__ = inspect.signature(detect)  # type: ignore[attr-defined]
    monkeypatch.setattr(find, "AT_ONCE", 1)
    monkeypatch.setattr(module, "noise_magnitude", third_fails)
    assert main(args) == 130
    assert main([*args, "--resume"]) == 0, capsys.readouterr().err
    assert asked == ["a red cat", "a blue dog", "a house", "a house", "a car"]
    whole = [*args[:-1], "g"]
    assert main(whole) == 0
    assert (Path("f") / "scores.csv").read_text() == (Path("g") / "scores.csv").read_text()


def test_thresholds() -> None:
    assert threshold([1.0, 2.0, 3.0, 4.0], 0.5, True) == 3.0
    assert threshold([1.0, 2.0, 3.0, 4.0], 0.99, True) == 4.0
    assert threshold([1.0, 2.0, 3.0, 4.0], 0.99, False) == 1.0


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "needs one of find, prune, attack, repair"),
        (["prun"], "cannot 'prun'; did you mean 'prune'?"),
        (["prune"], "`mmforget memorization prune` needs PIPELINE"),
        (["prune", "x"], "`--memorized` is missing"),
        (["prune", "x", "--memorized", "none.csv"], "no such file or folder"),
        (["prune", "planted", "--methd", "nemo"], "did you mean '--method'?"),
        (["prune", "planted", "--method", "nmo"], "`--method` is 'nmo', did you mean 'nemo'?"),
        (["prune", "planted", "--method", "no.Such"], "there is no class 'no.Such'"),
        (["prune", "planted", "--set", "ratioo=1"], "has no setting 'ratioo'; did you mean"),
        (["prune", "planted", "--control", "randm"], "`--control` is 'randm', did you mean"),
        (["prune", "planted", "--control", "none", "--control", "random"], "beside others"),
        (["prune", "planted", "--require", "copys<=0"], "names 'copys'; did you mean 'copies'?"),
        (["prune", "planted", "--require", "attack<=0"], "needs the attack; add `--attack`"),
        (["prune", "planted", "--require", "held_out_copies<=0", "--share", "1"], "held out"),
        (["prune", "planted", "--share", "0"], "`share` is 0.0, it must be above 0"),
        (["prune", "planted", "--similarity", "ncd"], "`similarity` is 'ncd', did you mean 'ncc'"),
        (["prune", "planted", "--similarity-set", "x"], "`--similarity-set` is 'x'; write"),
        (["prune", "planted", "--pictures", "0"], "`audit.pictures` is 0"),
        (["prune", "planted", "--attack", "--attack-start", "randm"], "did you mean 'random'?"),
        (["prune", "planted", "--dtype", "float61"], "`--dtype` is 'float61'"),
        (["prune", "planted", "--resume"], "there is no unfinished run"),
        (["attack", "planted"], "needs `--against`"),
        (["repair", "planted", "--method", "sis"], "`--method` is 'sis', did you mean 'siss'?"),
        (["repair", "planted", "--method", "perp"], "needs `--mask`"),
        (["repair", "planted", "--steps", "0"], "`--steps` is 0"),
        (["repair", "planted", "--mask", "no.safetensors"], "`--mask` is 'no.safetensors'"),
        (["find", "x"], "`--prompts` is missing"),
        (["find", "planted", "--detector", "noise"], "`--detector` is 'noise'"),
        (["find", "planted", "--quantile", "1"], "must lie between 0 and 1"),
        (["find", "planted", "--set", "nn=1"], "has no setting 'nn'"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    further = ["--quiet", "--device", "cpu"] if len(args) > 1 else []
    assert text in fails(capsys, *args, *further)
    left = [path for path in Path().rglob("*") if path.is_file()]
    assert left == []  # nothing was begun


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memorization", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ACTIONS)
    for args in (["memorization", "repair", "--help"], ["help", "memorization", "repair"]):
        assert main(args) == 0
        assert capsys.readouterr().out.startswith("usage: mmforget memorization repair")
    for name in prune.LOCATORS:
        assert name in prune.HELP
    for name in repair.REPAIRS:
        assert name in repair.HELP
    for name in find.DETECTORS:
        assert name in find.HELP
    for name in OF_MEMORIES:
        assert name in prune.HELP
    for metric, _ in OF_MEMORIES.values():
        assert metric in METRICS
    assert find_class("nemo", prune.LOCATORS, "--method").__name__ == "NeMo"


def test_the_front_door_loads_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from mmforget.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    codes = [main(['memorization', name, '--help']) for name in "
        "('find', 'prune', 'attack', 'repair')]\n"
        "with contextlib.redirect_stderr(io.StringIO()):\n"
        "    codes += [main(['memorization', 'prune', 'planted', '--method', 'nmo'])]\n"
        "assert codes == [0, 0, 0, 0, 2], codes\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_attack_without_controls_meets_no_requirement() -> None:
    def found(*metrics: str) -> float | None:
        rows = [
            MetricResult(metric, "pruned", "relearning", 0.0, "lower", split)
            for metric, split in zip(metrics, ("located/verbatim", "never_trained"), strict=False)
        ]
        results = Results(
            "t", "concept_removal", [], {}, [ModelEntry("pruned", "unlearned")], rows, [],
            Verdict("removed", ""),
        )  # fmt: skip
        return Requirement.parse("attack<=0.1", OF_MEMORIES).measured(results)

    assert found("attack_embedding") is None
    assert found("attack_embedding", "attack_embedding_controls") == 0.0
