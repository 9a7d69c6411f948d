"""GS-LoRA: adapters, hinge, groups, proximal zeros."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mmforget import ForgetRequest, GSLoRA, GSLoRAPlusPlus, ImageClassifier
from mmforget.artifacts.adapters import apply_adapter, withdraw_adapter
from mmforget.errors import CapabilityError, ConfigurationError, ModelError, WeightsError
from mmforget.methods.gs_lora import proximal_factor
from mmforget.methods.gs_lora_plus_plus import prototype_divergence
from mmforget.models import state_hash


def vit(**settings) -> ImageClassifier:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return ImageClassifier(
        "vit_tiny_patch16_224", num_classes=10, network_args=sizes | settings
    ).fresh(0)


def randomised(method: GSLoRA) -> GSLoRA:
    """Adapters that do something, as after training."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in method.adapted:
            b = method.factors(site)[1]
            b.copy_(0.1 * torch.randn(b.shape, generator=draw))
    return method


def test_fresh_adapters_leave_the_output_bit_identical(tiny_model):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = tiny_model(images)
    method = GSLoRA(tiny_model)
    assert torch.equal(method.model.eval()(images), before)


@pytest.mark.parametrize(
    ("network", "sizes", "adapters", "base"),
    [
        ("vit_base_patch16_224", {}, 737_280, 85_875_556),
        (
            "vit_base_patch16_224",
            {"embed_dim": 512, "depth": 6, "num_heads": 8},
            245_760,
            None,
        ),
    ],
)
def test_number_of_adapter_parameters(network, sizes, adapters, base):
    with torch.device("meta"):
        model = ImageClassifier(network, num_classes=100, network_args=sizes)
    if base is not None:
        assert sum(p.numel() for p in model.parameters()) == base
    sites = model.sites("ffn")
    assert sum(8 * (s.module.in_features + s.module.out_features) for s in sites) == adapters


def test_trainable_parameters_are_the_adapters_only(tiny_model):
    method = GSLoRA(tiny_model)
    trained = {n for n, p in method.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    expected = sum(8 * (s.module.in_features + s.module.out_features) for s in method.adapted)
    assert sum(p.numel() for p in method.model.parameters() if p.requires_grad) == expected


def test_group_norm_at_initialisation():
    # ||A||² has expectation r·in·bound²/3 = r/3 for each of the two factors A; B is zero.
    method = GSLoRA(vit(embed_dim=256, num_heads=4))
    for members in method.groups.values():
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in members))
        assert norm == pytest.approx(math.sqrt(2 * 8 / 3), rel=0.02)
    assert len(method.groups) == 2


@pytest.mark.parametrize(("group", "count"), [("block", 2), ("lora", 4), ("matrix", 8)])
def test_group_granularity(tiny_model, group, count):
    method = GSLoRA(tiny_model, group=group)
    assert len(method.groups) == count
    assert sum(len(members) for members in method.groups.values()) == 8


def test_group_lasso_values(tiny_model):
    method = GSLoRA(tiny_model)
    with torch.no_grad():
        for members in method.groups.values():
            for parameter in members:
                parameter.fill_(0.1)
    sizes = [sum(p.numel() for p in members) for members in method.groups.values()]
    expected = sum(math.sqrt(0.01 * size) for size in sizes)
    assert float(method.structure().detach()) == pytest.approx(expected, rel=1e-5)
    separate = GSLoRA(tiny_model, norm="separate")
    with torch.no_grad():
        for members in separate.groups.values():
            for parameter in members:
                parameter.fill_(0.1)
    expected = sum(0.1 * math.sqrt(p.numel()) for m in separate.groups.values() for p in m)
    assert float(separate.structure().detach()) == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_penalty_is_finite_at_a_zero_group(tiny_model):
    method = GSLoRA(tiny_model)
    first = next(iter(method.groups.values()))
    with torch.no_grad():
        for parameter in first:
            parameter.zero_()
    method.structure().backward()
    for parameter in first:
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_proximal_factor_by_hand():
    assert float(proximal_factor(torch.tensor(2.0), 0.5)) == 0.75
    assert float(proximal_factor(torch.tensor(0.4), 0.5)) == 0.0
    assert float(proximal_factor(torch.tensor(0.0), 0.5)) == 0.0
    assert float(proximal_factor(torch.tensor(0.0), 0.0)) <= 1.0


def test_automatic_bound_is_twice_the_loss_of_guessing(tiny_model):
    assert GSLoRA(tiny_model).bound == pytest.approx(2 * math.log(10))
    assert GSLoRA(tiny_model, bound=105).bound == 105


def test_hinge_closes_at_the_bound(tiny_model):
    values = torch.tensor([1.0, 9.0], requires_grad=True)
    weight = torch.ones(2)
    batch = GSLoRA(tiny_model, hinge="batch")
    assert float(batch.bounded(values, weight, 6.0)) == 1.0  # 6 - mean(1, 9)
    closed = batch.bounded(values, weight, 5.0)
    closed.backward()
    assert float(closed) == 0.0
    assert torch.equal(values.grad, torch.zeros(2))
    single = GSLoRA(tiny_model, hinge="sample")
    assert float(single.bounded(values, weight, 5.0)) == 2.0  # mean(5 - 1, 0)


def test_hinge_ignores_padding(tiny_model):
    method = GSLoRA(tiny_model)
    values, weight = torch.tensor([1.0, 100.0]), torch.tensor([1.0, 0.0])
    assert float(method.bounded(values, weight, 6.0)) == 5.0


def test_prototype_divergence_by_hand():
    prototype = torch.tensor([[0.0, math.log(2.0), 0.0]])  # softmax: 1/4 1/2 1/4
    feature = torch.tensor([[0.0, 0.0, 0.0]])  # softmax: 1/3 each
    expected = 0.5 * math.log(0.25 * 3) + 0.5 * math.log(0.5 * 3)
    assert float(prototype_divergence(prototype, feature)) == pytest.approx(expected, abs=1e-6)
    assert float(prototype_divergence(prototype, prototype)) == pytest.approx(0, abs=1e-7)


def test_merged_and_unmerged_outputs_agree(tiny_model):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method = randomised(GSLoRA(tiny_model))
    unmerged = method.model.eval()(images).detach()
    unlearned = method.finalize()
    assert not torch.allclose(unmerged, tiny_model(images), atol=1e-3)
    assert torch.allclose(unlearned(images), unmerged, atol=1e-5)
    assert not [name for name, _ in unlearned.named_modules() if "lora" in name]


def test_detaching_in_place_restores_the_bits(tiny_model):
    start = state_hash(tiny_model)
    images = torch.rand(2, 3, 32, 32)
    method = randomised(GSLoRA(tiny_model, copy=False))
    assert not torch.equal(method.model.eval()(images), copy.deepcopy(method).restore()(images))
    assert method.restore() is tiny_model
    assert state_hash(tiny_model) == start


def test_adapter_can_be_withdrawn_and_applied_again(tiny_model, tmp_path: Path):
    method = randomised(GSLoRA(tiny_model))
    unlearned = method.finalize()
    method.save_adapter(tmp_path / "adapter")
    again = copy.deepcopy(tiny_model)
    apply_adapter(again, tmp_path / "adapter")
    for one, other in zip(unlearned.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    withdraw_adapter(unlearned, tmp_path / "adapter")
    for one, other in zip(unlearned.parameters(), tiny_model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_adapter_loads_with_peft_alone(tiny_model, tmp_path: Path):
    from peft import PeftModel

    method = randomised(GSLoRA(tiny_model))
    unlearned = method.finalize()
    method.save_adapter(tmp_path)
    network = copy.deepcopy(tiny_model.network)
    loaded = PeftModel.from_pretrained(network, str(tmp_path)).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded(images), unlearned.network(images), atol=1e-5)


def test_adapter_of_another_architecture_is_refused_before_anything_changes(tiny_model, tmp_path):
    method = randomised(GSLoRA(tiny_model))
    method.finalize()
    method.save_adapter(tmp_path)
    other = vit()
    start = state_hash(other)
    with pytest.raises(WeightsError, match="does not fit the layer"):
        apply_adapter(other, tmp_path)
    assert state_hash(other) == start


def test_adapters_of_convolutions(tmp_path: Path):
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "conv_mlp": True}
    model = ImageClassifier("convnext_atto", num_classes=10, network_args=sizes).fresh(0).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method = GSLoRA(model, rank=4)
    assert torch.equal(method.model.eval()(images), model(images))
    randomised(method)
    unmerged = method.model(images).detach()
    unlearned = method.finalize()
    assert torch.allclose(unlearned(images), unmerged, atol=1e-5)
    method.save_adapter(tmp_path)
    withdraw_adapter(unlearned, tmp_path)
    assert torch.allclose(unlearned(images), model(images), atol=1e-5)


def test_proximal_mode_makes_exact_zeros_and_reports_them(tiny_model, tiny_data, quiet_trainer):
    method = GSLoRA(tiny_model, proximal=True, sparsity=200.0, lr=1e-2)
    tiny_data.view = method.view
    quiet_trainer(max_epochs=2).fit(method, datamodule=tiny_data)
    method.finalize()
    report = method.statistics()
    assert report["exactly_zero_groups"] == report["groups"] == 2
    assert report["zero_group_ratio"] == 1.0
    assert method.no_op  # with every group gone nothing is left, and the method says so


def test_dropping_small_groups(tiny_model):
    method = randomised(GSLoRA(tiny_model, drop_zero_groups=True, zero_threshold=1e-4))
    first, second = dict.fromkeys(site.block for site in method.adapted)
    with torch.no_grad():
        for site in method.adapted:
            if site.block == first:
                method.factors(site)[1].mul_(1e-6)
    method.finalize()
    assert method.no_op is False
    changed = {
        name.split(".mlp")[0].removeprefix("network.")
        for (name, one), other in zip(
            method.model.named_parameters(), tiny_model.parameters(), strict=True
        )
        if not torch.equal(one, other)
    }
    assert changed == {second}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hinge": "batches"}, "did you mean 'batch'"),
        ({"group": "blocks"}, "did you mean 'block'"),
        ({"norm": "joined"}, "`norm`"),
        ({"rank": 0}, "`rank` is 0"),
        ({"lr": 0.0}, "`lr` is 0.0"),
    ],
)
def test_wrong_settings(tiny_model, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        GSLoRA(tiny_model, **settings)


def test_a_model_without_feed_forward_layers_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(CapabilityError):
        GSLoRA(ImageClassifier(network, num_classes=10))


def test_prototypes_are_class_means_of_the_original(tiny_model, tiny_data):
    method = GSLoRAPlusPlus(tiny_model)
    method.bind(tiny_data)
    method.compute_prototypes()
    data = tiny_data.dataset("train")
    batch = data[list(range(len(data)))]
    features = tiny_model.features(batch)
    for label in range(10):
        expected = features[batch["label"] == label].mean(0)
        assert torch.allclose(method.prototypes[label], expected, atol=1e-5)
    carried = method.carry()
    assert not carried["prototype_known"][3] and carried["prototype_known"].sum() == 9
    assert not carried["prototypes"][3].any()


def test_prototypes_of_a_random_network_are_refused(tiny_data, quiet_trainer):
    method = GSLoRAPlusPlus(vit())
    tiny_data.view = method.view
    with pytest.raises(ModelError, match="prototypes need a trained model"):
        quiet_trainer().fit(method, datamodule=tiny_data)


def test_inherited_prototypes_are_not_computed_again(tiny_model, tiny_data, quiet_trainer):
    first = GSLoRAPlusPlus(tiny_model)
    first.bind(tiny_data)
    first.compute_prototypes()
    state = first.carry()
    state["prototypes"] = state["prototypes"] + 1
    tiny_data.request(ForgetRequest(classes=(3,)), ForgetRequest(classes=(7,)))
    second = GSLoRAPlusPlus(tiny_model)
    second.inherit(state)
    tiny_data.view = second.view
    quiet_trainer().fit(second, datamodule=tiny_data)
    assert torch.equal(second.prototypes, state["prototypes"])


def test_both_prototype_terms_act(tiny_model, tiny_data):
    method = GSLoRAPlusPlus(tiny_model, w_forget=0.5, w_retain=0.25)
    method.bind(tiny_data)
    method.compute_prototypes()
    batch = {role: tiny_data.subset("train", role)[list(range(8))] for role in ("forget", "retain")}
    terms = method.losses(batch)
    divergences = {
        role: prototype_divergence(
            method.prototypes[part["label"]], tiny_model.features(part)
        ).mean()
        for role, part in batch.items()
    }
    assert float(terms["prototype_forget"]) == pytest.approx(
        0.5 * (18 - float(divergences["forget"])), rel=1e-4
    )
    assert float(terms["prototype_retain"]) == pytest.approx(
        0.25 * float(divergences["retain"]), rel=1e-3
    )
