"""The frame of the methods that erase named concepts."""

from __future__ import annotations

import logging

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, ModelError, RequestError
from mmforget.methods.denoiser_weights import select_weights
from mmforget.methods.esd import ESD
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

FAST = {"steps": 3, "trajectories": 2, "lr": 1e-3}
SPEC = ConceptSpec("van gogh", preserve=("monet",))


@pytest.fixture
def model() -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline("sd"), steps=3)


def fitted(method, steps=3, **settings):
    quiet_trainer(max_steps=steps, **settings).fit(method)
    return method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"retain_batch_size": 0}, "`retain_batch_size` is 0"),
        ({"retain_weight": -1.0}, "`retain_weight` is -1.0"),
        ({"clip": 0.0}, "`clip` is 0.0"),
        ({"lr": 0.0}, "`lr` is 0.0"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ESD(model, SPEC, **(FAST | settings))


def test_bad_concepts(model, caplog):
    with pytest.raises(RequestError, match="is empty"):
        ESD(model, [], **FAST)
    with pytest.raises(RequestError, match="to be erased for"):
        ESD(model, [SPEC, ConceptSpec("monet")], **FAST)
    with pytest.raises(RequestError, match="tokens"):
        ESD(model, ConceptSpec("van gogh", preserve=("cat " * 20,)), **FAST)
    with caplog.at_level(logging.WARNING):
        ESD(model, ConceptSpec("gogh", preserve=("van gogh",)), **FAST)
    assert "contains an erased word" in caplog.text


def test_half_precision_on_the_cpu_is_refused(model):
    model.network.half()
    with pytest.raises(ModelError, match="single precision"):
        ESD(model, SPEC, **FAST)


def test_half_precision_elsewhere_trains_in_single_precision(model, monkeypatch):
    monkeypatch.setattr(DiffusionGenerator, "require_full_precision", lambda *_: None)
    model.network.to(torch.bfloat16)
    method = ESD(model, SPEC, **(FAST | {"lr": 1e-2}))
    chosen = {site.name for site in select_weights(model, "x")}
    types = {
        name: parameter.dtype
        for name, parameter in method.model.network.named_parameters()
        if name.rpartition(".")[0] in chosen
    }
    assert set(types.values()) == {torch.float32}
    result = fitted(method).finalize()
    assert {p.dtype for p in result.network.parameters()} == {torch.bfloat16}
    assert not method.no_op


def test_retained_answers_are_weighed(model):
    batches = {}
    for weight in (1.0, 3.0):
        method = fitted(ESD(model, SPEC, retain_weight=weight, **(FAST | {"lr": 1e-9})))
        batch = {name: part[[0, 1]] for name, part in method.records.items()}
        # Away from the frozen model, which answers the retain records without any error.
        with torch.no_grad():
            next(iter(method.trained())).add_(0.5)
        batches[weight] = {k: float(v.detach()) for k, v in method.losses(batch).items()}
    assert batches[3.0]["forget"] == pytest.approx(batches[1.0]["forget"])
    assert batches[3.0]["retain"] == pytest.approx(3 * batches[1.0]["retain"], rel=1e-4)
    assert batches[1.0]["retain"] > 0


def test_without_weight_or_texts_there_are_no_retain_records(model):
    assert set(fitted(ESD(model, SPEC, retain_weight=0.0, **FAST)).records) == {"forget"}
    method = fitted(ESD(model, ConceptSpec("van gogh"), **FAST))
    assert set(method.records) == {"forget"}
    assert method.cost()["retain_sample_passes"] == 0


def test_both_streams_are_as_if_they_were_alone(model):
    """One forward pass serves both; the prompts of the second stream are found in the table."""
    method = fitted(ESD(model, SPEC, **FAST))
    forget, retain = (method.records[name] for name in ("forget", "retain"))
    together = method.losses({"forget": forget[[0, 2]], "retain": retain[[1, 3]]})
    for name, records, rows in (("forget", forget, [0, 2]), ("retain", retain, [1, 3])):
        part = records[rows]
        table = model.encode(list(records.prompts))
        found = method.model.predict(part["noisy"], part["time"], table[part["prompt"]])
        alone = (found - part["target"]).square().mean()
        torch.testing.assert_close(together[name], alone, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_falls_to_a_tenth(model):
    method = ESD(model, SPEC, **FAST)
    trainer = quiet_trainer(max_steps=5)
    trainer.fit(method)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(("own", "trainers", "expected"), [(1e-3, None, 1e-3), (1.0, 1e-2, 1e-2)])
def test_gradients_are_clipped(model, own, trainers, expected):
    norms = []

    class Watched(ESD):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(float(torch.cat([g.reshape(-1) for g in grads]).norm()))

    method = Watched(model, SPEC, clip=own, **FAST)
    fitted(method, gradient_clip_val=trainers)
    assert len(norms) == 3
    assert max(norms) <= expected * 1.001


def test_training_takes_one_pass_per_step_and_no_teacher(model):
    method = ESD(model, SPEC, **FAST)
    calls = []

    trainer = quiet_trainer(max_steps=4)
    original = method.on_train_epoch_start

    def start():
        original()
        if not calls:
            method.model.network.register_forward_hook(lambda *_: calls.append(1))

    method.on_train_epoch_start = start
    trainer.fit(method)
    assert len(calls) == 4


def test_a_second_fit_goes_on_with_the_records(model):
    method = fitted(ESD(model, SPEC, **FAST))
    records = method.records
    spent = method.cost()["sample_passes"]
    fitted(method, steps=1)
    assert method.records is records
    assert method.cost()["sample_passes"] == spent + 3 * (4 + 4)


def test_in_place_there_is_no_second_denoiser(model):
    method = ESD(model, SPEC, copy=False, **FAST)
    assert method.model is model
    own = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in method.parameters()) == own
    result = fitted(method).finalize()
    assert result is model
    with pytest.raises(ConfigurationError, match="copy=True"):
        method.restore()


def test_the_edit_leads_from_the_original_to_the_result(model):
    method = fitted(ESD(model, SPEC, **FAST))
    result = method.finalize()
    edit = method.weight_edit()
    assert edit.kind == "replace"
    assert edit.metadata["method"] == "ESD"
    assert edit.metadata["concepts"][0]["target"] == "van gogh"
    edit.apply(model)
    for name, value in result.network.state_dict().items():
        assert torch.equal(value, model.network.state_dict()[name])
