"""Controls and the oracle: Identity, LogitMask, HeadOnly, Retrain; and NegGrad+."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmforget.errors import CapabilityError, ConfigurationError, ModelError, RequestError
from mmforget.methods import HeadOnly, Identity, LogitMask, NegGradPlus, Retrain
from mmforget.models import ImageClassifier, load_classifier, state_hash
from mmforget.request import ForgetRequest
from mmforget.testing.conformance import accuracy, quiet_trainer, whole
from mmforget.testing.patterns import PatternData, pattern_model


@pytest.fixture
def model() -> ImageClassifier:
    return pattern_model()


def requested(*requests: ForgetRequest, **settings) -> PatternData:
    data = PatternData(**settings)
    data.request(*(requests or (ForgetRequest(classes=(1,)),)))
    return data


def fitted(method, epochs: int = 1):
    data = requested(view=method.view, batch_size=31)
    quiet_trainer(max_epochs=epochs).fit(method, datamodule=data.restricted(method.access))
    return method


def test_identity_is_a_no_op_that_does_not_warn(model, caplog):
    result = Identity(model).finalize()
    assert state_hash(result) == state_hash(model)
    assert not caplog.records


def test_logit_mask_masks_current_and_earlier_classes(model, tmp_path):
    data = requested(ForgetRequest(classes=(4,)), ForgetRequest(classes=(1,)))
    method = LogitMask(model)
    method.bind(data)
    result = method.finalize()
    batch = whole(data.dataset("test"))
    masked, before = result.logits(batch), model.logits(batch)
    assert (masked[:, [1, 4]] == -1e4).all()
    assert torch.equal(masked[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert torch.equal(result.features(batch), model.features(batch))
    result.save_native(tmp_path)
    assert torch.equal(load_classifier(tmp_path).logits(batch), masked)


def test_logit_mask_needs_classes_and_a_bias(model):
    method = LogitMask(model)
    with pytest.raises(ConfigurationError, match="LogitMask has no data yet"):
        method.finalize()
    method.bind(requested(ForgetRequest(samples=(1, 2))))
    with pytest.raises(RequestError, match="the request names none"):
        method.finalize()
    bare = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5, bias=False)), 5)
    with pytest.raises(CapabilityError, match="LogitMask needs a bias"):
        LogitMask(bare)


def test_head_only_leaves_everything_below_the_head(model):
    result = fitted(HeadOnly(model)).finalize()
    changed = {
        name
        for name, value in result.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    }
    assert changed == {"network.head.weight", "network.head.bias"}
    batch = whole(requested().subset("test", "retain"))
    assert torch.equal(result.features(batch), model.features(batch))
    assert all(p.requires_grad for p in result.parameters())


def test_head_only_starts_from_a_new_head(model):
    one, same, other = HeadOnly(model), HeadOnly(model), HeadOnly(model, seed=1)
    heads = [method.model.head.weight for method in (one, same, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    alike = torch.cosine_similarity(heads[0].flatten(), model.head.weight.flatten(), dim=0)
    assert alike.abs() < 0.3
    bias = one.model.head.bias  # one number, which tells no class from another
    assert (bias == bias[0]).all()


def test_retrain_inherits_nothing(model):
    method = Retrain(model, seed=3)
    drawn = {name: value.clone() for name, value in method.model.named_parameters()}
    for name, old in model.named_parameters():
        constant = (drawn[name] == drawn[name].reshape(-1)[0]).all()  # biases 0, norms 1
        assert constant or not torch.equal(drawn[name], old), name
    result = fitted(method, epochs=1).finalize()
    for name, new in result.named_parameters():
        assert not torch.equal(new, dict(model.named_parameters())[name]), name
    assert method.restore() is model


def test_retrain_uses_the_models_own_recipe(model):
    method = Retrain(model)
    data = requested(view="retain", batch_size=31)
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(method, datamodule=data)
    expected, _ = model.optimizers_for(12)
    found = trainer.optimizers[0]
    assert type(found) is type(expected)
    assert [g["weight_decay"] for g in found.param_groups] == [0.05, 0.0]
    assert [g["initial_lr"] for g in found.param_groups] == [model.lr] * 2
    assert found.param_groups[0]["lr"] < 1e-2 * model.lr  # the end of the cosine


def test_retrain_never_sees_the_forget_set(model):
    method = fitted(Retrain(model), epochs=6)
    data = requested()
    assert method.cost()["forget_sample_passes"] == 0
    result = method.finalize()
    assert accuracy(result, whole(data.subset("test", "retain"))) > 0.9
    assert accuracy(result, whole(data.subset("test", "forget"))) == 0


def test_retrain_needs_to_know_how_the_network_is_built():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    with pytest.raises(ModelError, match="as an object"):
        Retrain(ImageClassifier(network, num_classes=5))


def test_neg_grad_plus_weighs_the_two_means(model):
    method = NegGradPlus(model, alpha=0.8)
    data = requested()
    forget = data.subset("train", "forget")[[0, 1, 2, ~0]]  # padding does not count
    retain = data.subset("train", "retain")[[0, 1]]
    terms = method.losses({"forget": forget, "retain": retain})
    torch.testing.assert_close(terms["retain"], 0.8 * model.loss(retain).mean())
    torch.testing.assert_close(terms["forget"], -0.2 * model.loss(forget)[:3].mean())
    with pytest.raises(ConfigurationError, match="`alpha` is 1"):
        NegGradPlus(model, alpha=1)
