"""Sequences of requests: each from the result of the last, resumed to the same weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from mmforget import DigitWorld, ForgetRequest, GSLoRAPlusPlus, SequenceRunner
from mmforget.errors import ConfigurationError, RequestError
from mmforget.methods.base import ForgettingMethod
from mmforget.models import state_hash

REQUESTS = [ForgetRequest(classes=("three",)), ForgetRequest(classes=("seven",))]


class Killer(Callback):
    """Interrupts the second request in the middle of an epoch, as Ctrl-C does."""

    def __init__(self, request: int, epoch: int) -> None:
        self.request, self.epoch = request, epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        folder = Path(trainer.default_root_dir).name
        at = trainer.current_epoch == self.epoch and batch_idx == 1
        if folder == f"request-{self.request}" and at:
            raise KeyboardInterrupt


@pytest.fixture
def run(tiny_model, quiet_trainer) -> Callable[..., SequenceRunner]:
    def make(folder: Path, *extra: Callback, model=tiny_model, requests=REQUESTS):
        def trainer(**settings) -> Trainer:
            callbacks = [*settings.pop("callbacks", []), *extra]
            return quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=callbacks, **settings)

        def method(current) -> ForgettingMethod:
            return GSLoRAPlusPlus(current, lr=1e-2, beta=1.0)

        data = DigitWorld(strokes=60, variants=2, eval_variants=1, batch_size=16)
        return SequenceRunner(model, method, data, requests, trainer, folder)

    return make


def test_each_request_starts_from_the_last_and_all_are_audited(run, tmp_path, tiny_model):
    start = state_hash(tiny_model)
    result = run(tmp_path).run()
    assert state_hash(tiny_model) == start
    assert [step.request.name for step in result.steps] == ["forget-three", "forget-seven"]
    seen = {(row["step"], row["split"]) for row in result.rows}
    assert seen == {
        (0, "forget"),
        (0, "retain"),
        (1, "forget"),
        (1, "retain"),
        (2, "forget"),
        (2, "retain"),
        (2, "previous"),
    }
    assert {(row["step"], row["epoch"]) for row in result.curve} == {
        (step, epoch) for step in (1, 2) for epoch in (1, 2, 3)
    }
    assert all((tmp_path / f"request-{n}" / "adapter").is_dir() for n in (1, 2))
    cost = result.cost()
    forget, retain = 12, 108  # images of one digit, and of the others, twice cycled to 7 steps
    assert cost["retain_sample_passes"] >= 3 * 3 * 96 * 2
    assert cost["forget_sample_passes"] > 3 * 3 * forget
    assert cost["sample_passes"] == cost["forget_sample_passes"] + cost["retain_sample_passes"]
    assert retain > forget


@pytest.mark.parametrize(("request_number", "epoch"), [(1, 2), (2, 0), (2, 1)])
def test_interrupted_and_resumed_equals_unbroken(run, tmp_path, request_number, epoch):
    unbroken = run(tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Killer(request_number, epoch)).run()
    resumed = run(tmp_path / "broken").run()
    assert state_hash(resumed.model) == state_hash(unbroken.model)
    assert resumed.rows == unbroken.rows
    assert resumed.curve == unbroken.curve
    for one, other in zip(resumed.steps, unbroken.steps, strict=True):
        assert one.cost["sample_passes"] == other.cost["sample_passes"]
        assert one.statistics == other.statistics


def test_a_finished_request_is_not_run_again(run, tmp_path):
    first = run(tmp_path).run()
    stamps = [json.loads((tmp_path / f"request-{n}/done.json").read_text()) for n in (1, 2)]
    again = run(tmp_path, Killer(1, 0)).run()
    assert state_hash(again.model) == state_hash(first.model)
    assert stamps == [json.loads((tmp_path / f"request-{n}/done.json").read_text()) for n in (1, 2)]


def test_a_bad_second_request_is_refused_before_the_first_starts(run, tmp_path):
    bad = [ForgetRequest(classes=("three",)), ForgetRequest(classes=("three",))]
    with pytest.raises(RequestError, match="three"):
        run(tmp_path / "never", requests=bad)
    assert not (tmp_path / "never").exists()


def test_a_working_folder_of_another_model_is_refused(run, tmp_path, tiny_model):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killer(1, 1)).run()
    other = copy.deepcopy(tiny_model)
    next(other.parameters()).data.add_(1)
    with pytest.raises(ConfigurationError, match="another model"):
        run(tmp_path, model=other).run()


def test_two_processes_forget_like_one(run, tmp_path, tiny_model, quiet_trainer):
    one = run(tmp_path / "one").run()
    runner = run(tmp_path / "two")
    alone = runner.trainer
    runner.trainer = lambda **settings: alone(**settings, devices=2, strategy="ddp_fork")
    two = runner.run()
    for name, value in one.model.state_dict().items():
        assert torch.allclose(two.model.state_dict()[name], value, atol=2e-3), name
    assert {(r["step"], r["epoch"]) for r in two.curve} == {
        (r["step"], r["epoch"]) for r in one.curve
    }
    for step, other in zip(two.steps, one.steps, strict=True):
        assert step.cost["sample_passes"] == other.cost["sample_passes"]
