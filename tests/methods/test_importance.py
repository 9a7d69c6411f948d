"""Per-sample importance against a double-precision loop over single samples."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.importance import PerSampleImportance
from mmforget.models import ImageClassifier
from mmforget.models.multimodal import MultimodalLM
from mmforget.testing.patterns import TINY_VIT
from mmforget.testing.tiny_multimodal import tiny_multimodal, tiny_pictures

CLASSES = 5


class Residual(nn.Module):
    """Convolutions with stride, padding, dilation and groups, BatchNorm, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.grouped(x))).relu()
        return self.head(x.mean((2, 3)))


class SequenceFirst(nn.Module):
    """Turns the batch to the second axis, where row counts alone don't show the mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 16, stride=16)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)  # (L, B, D)
        return self.head(self.mix(x).tanh().mean(0))


class Odd(nn.Module):
    """A layer used twice, tied weights, a bare scale, and parameters that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.AvgPool2d(8)
        self.twice = nn.Linear(48, 48)
        self.tied = nn.Linear(48, 48)
        self.tied.weight = self.twice.weight
        self.scale = nn.Parameter(torch.full((48,), 0.7))
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(48, 48)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x).flatten(1)
        x = self.twice(self.twice(x).tanh()).tanh() * self.scale
        return self.head(self.frozen(self.tied(x).tanh()))


class _Cube(torch.autograd.Function):
    """An operation that `torch.func` cannot transform."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x**3 * scale

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return gradient * 3 * x**2 * scale, (gradient * x**3).sum(0)


class Opaque(nn.Module):
    """A parameter behind an operation without batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.AvgPool2d(8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1, 48))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(_Cube.apply(self.down(x).flatten(1), self.scale))


def classifier(network) -> ImageClassifier:
    torch.manual_seed(0)
    if network == "vit":
        model = ImageClassifier(
            "vit_tiny_patch16_224", num_classes=CLASSES, network_args=TINY_VIT
        ).fresh(0)
    elif network == "convnext":
        sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "patch_size": 2}
        sizes |= {"ls_init_value": 1.0}  # at 1e-6 single precision hides what is inside of a block
        model = ImageClassifier("convnext_atto", CLASSES, network_args=sizes).fresh(0)
    else:
        model = ImageClassifier(network(), num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def batch_of(size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(size, 3, 32, 32, generator=draw),
        "label": torch.randint(CLASSES, (size,), generator=draw),
        "id": torch.arange(size),
        "weight": torch.ones(size),
    }


def by_hand(model: ImageClassifier, batch, kind: str, membership) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).double()
    sums: dict[str, torch.Tensor] = {}
    for i in range(len(batch["id"])):
        one = {k: v[i : i + 1] for k, v in batch.items()} | {
            "image": batch["image"][i : i + 1].double()
        }
        model.zero_grad()
        if kind == "empirical_fisher":
            logits = model.logits(one)
            nn.functional.cross_entropy(logits, one["label"]).backward()
        else:
            model.logits(one).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                g = torch.zeros_like(p) if p.grad is None else p.grad
                value = g.abs() if kind == "abs_l2_output" else g**2
                added = membership[:, i].double().view(-1, *[1] * p.ndim) * value
                sums[name] = sums.get(name, 0) + added
    return sums


def computed(model, batch, kind, membership, chunk=None):
    importance = PerSampleImportance(model, kind, chunk)
    sums = torch.zeros(len(membership), importance.size, dtype=torch.float64)
    importance.add(batch, membership, sums)
    importance.flush(sums)
    return importance, sums


@pytest.mark.parametrize("kind", ["empirical_fisher", "abs_l2_output"])
@pytest.mark.parametrize("network", [Residual, "vit", "convnext", SequenceFirst, Odd, Opaque])
def test_equals_a_double_precision_loop_over_single_samples(network, kind):
    model, batch = classifier(network), batch_of(7)
    membership = torch.zeros(2, 7)
    membership[0, ::2] = 1
    membership[1, 1::2] = 1
    membership[:, -1] = 0  # padding of a distributed batch
    importance, sums = computed(model, batch, kind, membership)
    expected = by_hand(model, batch, kind, membership)
    assert list(expected) == list(importance.shapes)
    found = [importance.views(row) for row in sums]
    for name, value in expected.items():
        got = torch.stack([row[name] for row in found])
        tiny = 1e-6 * float(value.max())
        torch.testing.assert_close(got, value, rtol=1e-4, atol=tiny, msg=f"{name}: {{}}")


@pytest.mark.parametrize("network", [Residual, "vit"])
def test_usual_networks_need_no_vmap(network):
    importance, _ = computed(classifier(network), batch_of(4), "empirical_fisher", torch.ones(1, 4))
    assert importance._plans[()].rest == []


def test_a_layer_that_mixes_the_batch_axis_is_found_out():
    importance, _ = computed(
        classifier(SequenceFirst), batch_of(5), "empirical_fisher", torch.ones(1, 5)
    )
    assert "network.mix.weight" in importance._plans[()].rest
    assert "network.patch.weight" not in importance._plans[()].rest


def test_the_loop_takes_over_where_vmap_is_unsupported(caplog):
    with caplog.at_level(logging.WARNING):
        computed(classifier(Opaque), batch_of(9), "abs_l2_output", torch.ones(1, 9), chunk=3)
    assert sum("one by one" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("network", [Residual, "vit"])
@pytest.mark.parametrize("kind", ["empirical_fisher", "abs_l2_output"])
def test_same_sums_for_any_batch_size_and_order(network, kind):
    model, batch = classifier(network), batch_of(37)
    member = (torch.arange(37) % 4 == 0).float()
    results = []
    for size, order in ((37, torch.arange(37)), (5, torch.arange(37)), (16, torch.randperm(37))):
        importance = PerSampleImportance(model, kind, chunk=8)
        sums = torch.zeros(2, importance.size, dtype=torch.float64)
        for rows in order.split(size):
            part = {k: v[rows] for k, v in batch.items()}
            importance.add(part, torch.stack([member[rows], 1 - member[rows]]), sums)
        importance.flush(sums)
        results.append(sums)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=0)


def questions() -> dict[str, Any]:
    """Rows without, with one and with two pictures, some of another size, and texts of lengths."""
    one, two, three, four = tiny_pictures(4)
    wide = torch.cat([four, four], dim=2)
    return {
        "images": [[one], [], [two, three], [wide], [], [two], [three]],
        "question": ["what is this ?", "where is anna ?", "what are this ?", "who", "who", "who",
                     "tell me"],
        "answer": ["anna", "rome", "red blue", "no", "yes", "bert , bert", "clara"],
        "id": torch.arange(7),
        "weight": torch.ones(7),
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "trained"), [
    ("llava", ["language", "projector", "head"]),
    ("llava", ["vision"]),
    ("qwen2_5_vl", ["vision", "projector", "language"]),
])  # fmt: skip
def test_questions_with_any_number_of_pictures(kind, trained):
    model = MultimodalLM(*tiny_multimodal(kind), trained=trained).eval()
    batch = questions()
    importance = PerSampleImportance(model, "empirical_fisher", chunk=2)
    sums = torch.zeros(1, importance.size, dtype=torch.float64)
    weight = torch.tensor([1.0, 1, 1, 1, 2, 1, 0])
    for rows in (slice(0, 3), slice(3, 7)):
        part = {k: v[rows] for k, v in batch.items()}
        importance.add(part, weight[rows][None], sums)
    importance.flush(sums)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for row in range(7):
        loss = model.loss({k: v[row : row + 1] for k, v in batch.items()}).sum()
        if not loss.requires_grad:
            continue  # a text, of which the tower sees nothing
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                expected[name] += weight[row] * gradient.square()
    for name, value in importance.views(sums[0]).items():
        torch.testing.assert_close(
            value.float(), expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max() + 1e-9)
        )
    if "vision" not in trained:  # nothing is left to the slow loop
        assert not any(plan.rest for plan in importance._plans.values())


def test_weights_and_flags_of_the_model_are_left_alone():
    model = classifier(Residual)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    computed(model, batch_of(4), "empirical_fisher", torch.ones(1, 4))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_batch_statistics_are_refused():
    model = classifier(Residual).train()
    with pytest.raises(ConfigurationError, match=r"BatchNorm layer 'network.norm' .*model\.eval"):
        computed(model, batch_of(4), "empirical_fisher", torch.ones(1, 4))


def test_bad_settings():
    model = classifier(Residual)
    with pytest.raises(ConfigurationError, match="did you mean 'empirical_fisher'"):
        PerSampleImportance(model, "emperical_fisher")
    with pytest.raises(ConfigurationError, match="`chunk` is 0"):
        PerSampleImportance(model, "empirical_fisher", chunk=0)
    with pytest.raises(ConfigurationError, match="no parameter of the model is trainable"):
        PerSampleImportance(model.requires_grad_(False), "empirical_fisher")
    with pytest.raises(CapabilityError, match="HasLogits"):
        PerSampleImportance(nn.Linear(2, 2), "abs_l2_output")
