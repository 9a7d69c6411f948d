"""SalUn: the mask, and what strict freezing means."""

from __future__ import annotations

import pytest
import torch

from mmforget.errors import ConfigurationError
from mmforget.methods import SalUn
from mmforget.models import ImageClassifier
from mmforget.request import ForgetRequest
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.patterns import PatternData, pattern_model


@pytest.fixture
def model() -> ImageClassifier:
    return pattern_model()


def fitted(method: SalUn, batch_size: int = 31) -> SalUn:
    data = PatternData(batch_size=batch_size, view="paired")
    data.request(ForgetRequest(classes=(1,)))
    quiet_trainer(max_epochs=1).fit(method, datamodule=data)
    return method


def frozen_and_trained(method: SalUn, model: ImageClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes of the weights outside and inside of the mask."""
    pairs = zip(method.model.parameters(), model.parameters(), strict=True)
    change = torch.cat([(new - old).reshape(-1) for new, old in pairs]).detach()
    return change[~method.mask], change[method.mask]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam"])
def test_strict_freezing_keeps_the_bits_despite_weight_decay_and_momentum(model, optimizer):
    method = fitted(SalUn(model, lr=1e-2, weight_decay=0.1, optimizer=optimizer))
    frozen, trained_ = frozen_and_trained(method, model)
    assert len(frozen) > 0
    assert not frozen.any()
    assert (trained_ != 0).double().mean() > 0.9


def test_masked_gradients_alone_let_weight_decay_through(model):
    method = fitted(SalUn(model, lr=1e-2, weight_decay=0.1, optimizer="sgd", freeze="grad_only"))
    frozen, _ = frozen_and_trained(method, model)
    assert frozen.any()


def test_strict_freezing_clears_the_optimizer_state(model):
    method = SalUn(model, lr=1e-2, weight_decay=0.1, optimizer="sgd")
    data = PatternData(batch_size=31, view="paired")
    data.request(ForgetRequest(classes=(1,)))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(method, datamodule=data)
    state = trainer.optimizers[0].state
    momentum = torch.cat([state[p]["momentum_buffer"].reshape(-1) for p in method._trained()])
    assert not momentum[~method.mask].any()
    assert momentum[method.mask].any()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_share_of_trained_weights(model, fraction):
    method = fitted(SalUn(model, mask_fraction=fraction))
    assert method.statistics()["mask_fraction"] == pytest.approx(fraction, abs=1e-3)


def test_the_mask_is_that_of_the_sum_over_all_samples(model):
    data = PatternData()
    data.request(ForgetRequest(classes=(1,)))
    forget = data.subset("train", "forget")
    model.loss(forget[list(range(len(forget)))]).sum().backward()
    saliency = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).abs()
    expected = saliency > saliency.median()
    for batch_size in (4, 31):
        mask = fitted(SalUn(pattern_model()), batch_size).mask
        assert (mask == expected).double().mean() > 0.9999


def test_the_pass_for_the_mask_is_counted(model):
    method = fitted(SalUn(model))
    # 31 for the mask; one epoch of 124 retained samples with the forget set four times: 124
    assert method.sample_passes[0].tolist() == [0, 31 + 124]
    assert method.sample_passes[1].tolist() == [0, 124]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_fraction": 0.0}, "`mask_fraction` is 0.0"),
        ({"freeze": "strickt"}, "did you mean 'strict'"),
        ({"forget_weight": 0.0}, "`forget_weight` is 0.0"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SalUn(model, **settings)
