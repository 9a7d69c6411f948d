"""A whole run: what it leaves behind, and what it leaves alone when something goes wrong."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Callback

from mmforget import DigitWorld, ForgetRequest, GSLoRAPlusPlus, load_classifier
from mmforget.artifacts import Ledger, Manifest, save
from mmforget.artifacts.adapters import withdraw_adapter
from mmforget.attacks.relearning import RelearningSettings
from mmforget.audit import AuditSettings, Results
from mmforget.errors import RequestError, RunExistsError, StorageError, WeightsError
from mmforget.models import state_hash
from mmforget.run import AuditOptions, RunOptions, forget

REQUESTS = [ForgetRequest(classes=("three",)), ForgetRequest(classes=("seven",))]
QUICK = AuditSettings(
    replicates=100, random_inits=1, train_samples=50, relearning=RelearningSettings(steps=2)
)


class Interrupt(Callback):
    """Ctrl-C at the beginning of an epoch of one request."""

    def __init__(self, request: int, epoch: int) -> None:
        self.request, self.epoch = request, epoch

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        here = Path(trainer.default_root_dir).name == f"request-{self.request}"
        if here and trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.fixture
def start(tiny_model, quiet_trainer, tmp_path):
    def run(name="run", *extra, requests=REQUESTS, audited=False, model=tiny_model, **options):
        def trainer(**settings):
            callbacks = [*settings.pop("callbacks", []), *extra]
            return quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks, **settings)

        return forget(
            model,
            lambda current: GSLoRAPlusPlus(current, beta=1.0),
            DigitWorld(strokes=60, variants=2, eval_variants=1, batch_size=16),
            requests,
            trainer,
            RunOptions(tmp_path / name, title="A test", **options),
            AuditOptions(settings=QUICK, enabled=audited, control_epochs=1),
            "method: {class_path: GSLoRAPlusPlus}\n",
            "the tiny model",
        )

    return run


def test_a_run_leaves_behind_what_the_design_says(start, tiny_model, tmp_path):
    original = state_hash(tiny_model)
    folder = start(audited=True)
    assert state_hash(tiny_model) == original
    assert {path.name for path in folder.iterdir()} == {
        "artifact",
        "config.yaml",
        "report.html",
        "report.md",
        "request.json",
        "results.json",
        "split.json",
    }
    results = Results.load(folder)
    roles = [model.role for model in results.models]
    assert roles.count("original") == roles.count("unlearned") == 1
    assert roles.count("control") == 3
    assert not [row for row in results.metrics if row.error]
    assert results.get("h_mean_previous", "unlearned", "test_forget").value is not None
    assert {row["step"] for row in results.sequence} == {0, 1, 2}
    assert "A test" in (folder / "report.html").read_text()
    manifest = Manifest.read(folder / "artifact")
    assert manifest.base_hash == original
    assert manifest.verify(folder / "artifact") == []
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.verify(tmp_path) == []
    weights = folder / "artifact" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert any("model.safetensors" in problem for problem in ledger.verify(tmp_path))


def test_the_artifact_loads_with_timm_alone_and_a_request_can_be_withdrawn(start, tiny_model):
    artifact = start() / "artifact"
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = load_classifier(artifact)
    plain = timm.create_model(f"local-dir:{artifact}", pretrained=True).eval()
    assert torch.equal(plain((images - ours.mean) / ours.std), ours(images))
    for request in ("forget-seven", "forget-three"):
        withdraw_adapter(ours, artifact / "adapters" / request)
    assert torch.allclose(ours(images), tiny_model(images), atol=1e-4)


def test_an_existing_run_is_refused_and_left_alone(start, tmp_path):
    folder = start()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunExistsError, match="--overwrite"):
        start()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    start(overwrite=True)
    assert len(Ledger(tmp_path / "ledger.jsonl").entries()) == 2


@pytest.mark.parametrize(("request_number", "epoch"), [(1, 1), (2, 1)])
def test_interrupted_runs_can_be_resumed(start, tmp_path, request_number, epoch):
    whole = load_classifier(start("whole") / "artifact")
    with pytest.raises(KeyboardInterrupt):
        start("broken", Interrupt(request_number, epoch))
    assert not (tmp_path / "broken").exists()
    with pytest.raises(RunExistsError, match="--resume"):
        start("broken")
    resumed = load_classifier(start("broken", resume=True) / "artifact")
    assert state_hash(resumed) == state_hash(whole)
    assert len(Ledger(tmp_path / "ledger.jsonl").entries()) == 2


def test_a_run_that_stopped_before_anything_was_done_leaves_nothing(start, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start("early", Interrupt(1, 0))
    assert list(tmp_path.iterdir()) == []
    start("early")


def test_a_bad_request_touches_no_file(start, tmp_path):
    with pytest.raises(RequestError):
        start(requests=[ForgetRequest(classes=("eleven",))])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_end_loses_nothing(start, tmp_path, monkeypatch):
    whole = load_classifier(start("whole") / "artifact")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save, "atomic_write", full)
        with pytest.raises(StorageError, match="no space left"):
            start("full")
    assert not (tmp_path / "full").exists()
    assert len(Ledger(tmp_path / "ledger.jsonl").entries()) == 1
    resumed = load_classifier(start("full", resume=True) / "artifact")
    assert state_hash(resumed) == state_hash(whole)


def test_a_corrupted_checkpoint_is_one_sentence(start, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start("broken", Interrupt(1, 1))
    checkpoint = tmp_path / ".broken.partial" / "checkpoints" / "request-1" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(WeightsError, match=r"last\.ckpt.*delete"):
        start("broken", resume=True)


def test_request_file_holds_the_hashes(start):
    folder = start()
    body = json.loads((folder / "request.json").read_text())
    assert [entry["hash"] for entry in body["requests"]] == [r.hash for r in REQUESTS]
    assert body["split_hash"] == Manifest.read(folder / "artifact").split_hash
