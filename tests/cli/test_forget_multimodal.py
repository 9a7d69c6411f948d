"""The commands on multimodal language models, in process: what they leave and what they refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmforget import DigitQuestions, MultimodalLM, load_multimodal
from mmforget.audit.results import Results
from mmforget.cli.main import main
from mmforget.models.base import state_hash
from mmforget.testing.tiny_multimodal import tiny_multimodal

REPOSITORY = Path(__file__).parents[2]
DATA = (
    *("--data", "DigitQuestions", "--data.strokes", "10", "--data.scenes", "1"),
    *("--data.eval_scenes", "1", "--data.variants", "1", "--data.text_copies", "1"),
)
TRAINER = (
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"),
)
QUICK = (
    *("--audit.max_samples", "4", "--audit.candidates", "1", "--audit.examples", "1"),
    *("--audit.max_new_tokens", "2"),
    *("--audit.relearning.steps", "1", "--audit.relearning.learning_rates", "[1e-3]"),
    *("--audit.relearning.evaluation_records", "2", "--audit.controls", "[answer_ban]"),
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An untrained LLaVA as a native folder."""
    folder = tmp_path_factory.mktemp("original")
    network, processor = tiny_multimodal("llava", words=DigitQuestions.words)
    MultimodalLM(network, processor).save_native(folder)
    yield folder


@pytest.fixture(scope="module")
def run(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished and audited run of two requests."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    requests = "[{classes: [david]}, {classes: [henry], reason: asked for}]"
    argv = ["forget", "--model", str(original), "--method", "NegGradPlus", *DATA, *TRAINER, *QUICK]
    argv += ["--request", requests, "--audit.retrained", f"[{original}]", "--run", str(folder)]
    assert main(argv) == 0
    yield folder


def test_a_sequence_leaves_a_complete_run(original: Path, run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"artifact", "config.yaml", "request.json", "results.json", "report.html"} <= names
    unlearned = load_multimodal(run / "artifact")
    assert state_hash(unlearned) != state_hash(load_multimodal(original))
    card = (run / "artifact" / "README.md").read_text()
    assert "library_name: transformers" in card and "image-text-to-text" in card


def test_the_results_are_those_of_an_audit_of_answers(run: Path) -> None:
    results = Results.load(run)
    assert results.data["kind"] == "multimodal"
    assert [entry.role for entry in results.models] == [
        "original", "unlearned", "retrained", "control",
    ]  # fmt: skip
    rows = {(row.metric, row.split) for row in results.metrics if row.model == "unlearned"}
    for split in ("train_forget", "train_reworded", "test_forget", "test_previous"):
        assert ("attack_success", split) in rows
    assert ("sarr_strict", "test_retain") in rows
    assert not [row.error for row in results.metrics if row.error]
    assert {row["split"] for row in results.sequence} == {"forget", "previous", "retain"}
    assert {row["step"] for row in results.sequence} == {0, 1, 2}
    assert {row["split"] for row in results.curves["forgetting"]} >= {"forget", "retain"}
    # an untrained model knows nobody, which no audit can judge
    assert results.verdict.outcome == "not_discriminative"
    config = (run / "config.yaml").read_text()
    assert "evaluation_records: 2" in config  # nested settings of the audit can be given singly
    assert "Safe answers refused (SARR)" in (run / "report.md").read_text()


def test_an_audit_of_its_own(original: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["audit", str(run / "artifact"), "--against", str(original), *DATA]
    argv += ["--request.classes", "[henry]", "--settings.max_samples", "2", "--run", "again"]
    argv += ["--settings.max_new_tokens", "2"]
    assert main([*argv, "--settings.relearning.steps", "0", "--controls", "identity"]) == 0
    assert "report:" in capsys.readouterr().out
    results = Results.load(Path("again"))
    assert results.data["kind"] == "multimodal"
    assert [entry.name for entry in results.models][-1] == "identity"
    assert main(["report", str(run), "again", "--out", "both"]) == 2  # other splits


def test_fit_and_test_and_predict_and_export(
    original: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*DATA, *TRAINER]
    argv = ["fit", "--model", str(original), *common, "--trainer.limit_val_batches", "0"]
    assert main([*argv, "--view", "retain", "--request.classes", "[henry]", "--run", "new"]) == 0
    assert json.loads(Path("new/weights/training.json").read_text())["cost"]["sample_passes"] > 0
    limited = [*common, "--trainer.limit_test_batches", "1"]
    assert main(["test", "--model", "new/weights", *limited]) == 0
    assert "test/exact" in capsys.readouterr().out
    assert main(["predict", "--model", "new/weights", *common, "--out", "answers.csv"]) == 0
    rows = list(csv.reader(Path("answers.csv").read_text().splitlines()))
    assert rows[0] == ["id", "question", "answer", "true_answer"]
    assert len(rows) == 1 + 10 * 3 + 10 + 5
    assert ["give me the name of the person shown", "henry"] in [[r[1], r[3]] for r in rows]
    assert main(["export", str(run), "--to", "weights"]) == 0
    same = [state_hash(load_multimodal(folder)) for folder in ("weights", run / "artifact")]
    assert same[0] == same[1]


# ---- mistakes -----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command that must fail says, in at most three lines."""
    assert main(list(argv)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") <= 3 and "Traceback" not in said
    assert not Path("wrong").exists()
    return said


def forgetting(original: Path, *more: str) -> tuple[str, ...]:
    return (
        *("forget", "--model", str(original), "--method", "NegGradPlus", *DATA, *TRAINER),
        *("--run", "wrong", "--request.classes", "[henry]", *more),
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--request.classes", "[henri]"), "did you mean 'henry'"),
        (("--request.classes", "[other]"), "reveal no entity"),
        (("--data.forget_questions", "[nmae]"), "did you mean 'name'"),
        (("--data.retain_questions", "harmles"), "did you mean 'harmless'"),
        (("--audit.neighbours", "3"), "neighbours"),
        (("--audit.max_samples", "0"), "`audit.max_samples` is 0"),
        (("--audit.controls", "[logit_mask]"), "'answer_ban', 'head_only'"),
        (("--audit.relearning.parts", "[vison]"), "vison"),
        (("--audit.retrained", "[nowhere]"), "nowhere"),
        (("--audit.retrained", "[shipped:digit_world/classifier_vit]"), "take a MultimodalLM"),
        (("--method.alpha", "2"), "`alpha` is 2"),
    ],
)
def test_settings_that_are_refused(
    original: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, *forgetting(original, *more))


def test_models_and_data_that_do_not_fit(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["forget", "--model", str(original), "--method", "NegGradPlus", "--run", "wrong"]
    argv += ["--data", "DigitWorld", "--data.strokes", "20", "--request.classes", "[seven]"]
    assert "has no questions" in refused(capsys, *argv)
    argv = ["forget", "--model", "shipped:digit_world/classifier_vit", "--method", "NegGradPlus"]
    argv += [*DATA, "--request.classes", "[henry]", "--run", "wrong"]
    assert "take a MultimodalLM" in refused(capsys, *argv)
    argv = ["audit", str(original), "--against", "shipped:digit_world/classifier_vit", *DATA]
    argv += ["--request.classes", "[henry]", "--run", "wrong"]
    assert "take a MultimodalLM" in refused(capsys, *argv)
    argv = ["forget", "--model", str(original), "--method", "LogitMask", *DATA]
    argv += ["--request.classes", "[henry]", "--run", "wrong"]
    assert "HasLogits" in refused(capsys, *argv)


def test_a_family_that_is_not_supported(capsys: pytest.CaptureFixture[str]) -> None:
    """It is named together with those that are."""
    Path("other").mkdir()
    config = {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"]}
    Path("other/config.json").write_text(json.dumps(config))
    said = refused(capsys, *forgetting(Path("other")))
    assert "'other'" in said and "qwen2_5_vl" in said and "llava" in said


def test_half_precision_on_the_cpu(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(
        capsys, "predict", "--model", "MultimodalLM", "--model.network", str(original),
        "--model.dtype", "float16", *DATA, "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert "float16 on the CPU" in said


def test_too_long_questions(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is ever cut, least of all between visual tokens."""
    said = refused(
        capsys, "predict", "--model", "MultimodalLM", "--model.network", str(original),
        "--model.max_length", "8", *DATA, "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert "more than `max_length` 8" in said


CONFIGS = sorted(
    path
    for path in (REPOSITORY / "configs" / "multimodal").glob("*.yaml")
    if "method:" in path.read_text()
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_take_a_step(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With few records in place of the real ones."""
    more = ["--data.batch_size", "4", "--data.strokes", "10", "--data.scenes", "1"]
    more += ["--data.eval_scenes", "1", "--data.variants", "1", "--data.text_copies", "1"]
    assert main(["check", str(path), *more]) == 0
    assert f"'{path}' is fine" in capsys.readouterr().out
    assert not Path("runs").exists()
