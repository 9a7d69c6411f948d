"""MMUnlearner: the mask, what it holds, and how ascents are spread."""

from __future__ import annotations

import pytest
import torch

from mmforget.errors import ConfigurationError, NoOpError
from mmforget.methods import MMUnlearner
from mmforget.models.multimodal import MultimodalLM
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.named_patterns import WORDS, named_patterns
from mmforget.testing.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def shared() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava", WORDS)).eval()


class Recorder(MMUnlearner):
    """Writes down every step and which forgotten samples it saw."""

    def losses(self, batch):
        if not hasattr(self, "steps"):
            self.steps = []
        self.steps.append((self._phase, batch["forget"]["id"].tolist()))
        return super().losses(batch)


def fitted(method: MMUnlearner, epochs: int = 1, **settings) -> MMUnlearner:
    quiet_trainer(max_epochs=epochs).fit(
        method, datamodule=named_patterns(view=method.view, **settings)
    )
    return method


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def changes(method: MMUnlearner, shared: MultimodalLM) -> torch.Tensor:
    """Change of every trained weight, in the order of the mask."""
    given = dict(shared.named_parameters())
    return torch.cat(
        [
            (p.detach() - given[n].detach()).reshape(-1)
            for n, p in method.model.named_parameters()
            if p.requires_grad
        ]
    )


@pytest.mark.parametrize(
    ("modules", "optimizer"), [("vision", "sgd"), ("language", "adamw"), ("both", "adamw")]
)
def test_weights_outside_of_the_mask_keep_their_bits(shared, modules, optimizer):
    method = fitted(MMUnlearner(shared, lr=1e-2, modules=modules, optimizer=optimizer))
    change = changes(method, shared)
    assert 0.01 < method.mask.double().mean() < 0.9
    assert not change[~method.mask].any()
    assert (change[method.mask] != 0).double().mean() > 0.9
    parts = {
        "vision": {"vision", "projector"},
        "language": {"language"},
        "both": {"vision", "projector", "language"},
    }[modules]
    method.finalize()
    found = method.statistics()["mask_fraction_by_part"]
    assert set(found) == parts
    assert all(0 < share < 1 for share in found.values())


def test_only_the_ascent_may_be_masked(shared):
    method = fitted(MMUnlearner(shared, lr=1e-2, modules="language", mask_scope="forget"))
    assert changes(method, shared)[~method.mask].any()
    momenta = method.trainer.optimizers[0].state
    assert any(state["exp_avg"].any() for state in momenta.values())


def test_weights_that_are_no_such_matrix_stay_or_train(shared):
    frozen, free = (
        fitted(MMUnlearner(shared, lr=1e-2, modules="language", missing=missing))
        for missing in ("freeze", "free")
    )
    names = [n for n, p in frozen.model.named_parameters() if p.requires_grad]
    norm = next(n for n in names if n.endswith("layers.0.input_layernorm.weight"))
    start = dict(shared.named_parameters())[norm]
    assert torch.equal(frozen.model.get_parameter(norm), start)
    assert not torch.equal(free.model.get_parameter(norm), start)


def test_the_mask_is_the_ratio_of_squared_gradients(shared):
    data = named_patterns(batch_size=1000)  # one batch, so that the mean is that of one square
    method = MMUnlearner(shared, modules="language", threshold=2.0)
    method.bind(data)
    names = {n: p for n, p in method.model.named_parameters() if p.requires_grad}
    squares = {}
    for role in ("forget", "retain"):
        dataset = data.subset("train", role)
        found = method.model.eval().token_losses(dataset[list(range(len(dataset)))])
        loss = found.total.sum() / found.tokens.sum()
        squares[role] = [g.square() for g in torch.autograd.grad(loss, [*names.values()])]
    expected = torch.cat(
        [
            (((f + 1e-15) / (r + 1e-15) >= 2) & (f > 0)).reshape(-1) & ("_proj" in name)
            for name, f, r in zip(names, *squares.values(), strict=True)
        ]
    )
    mask = method.salient()
    assert (mask == expected).double().mean() > 0.999
    assert expected.any()


def test_the_mask_of_single_samples(shared):
    data = named_patterns()
    method = MMUnlearner(shared, modules="language", fisher="sample")
    method.bind(data)
    names = {n: p for n, p in method.model.named_parameters() if p.requires_grad}
    squares = {}
    for role in ("forget", "retain"):
        dataset = data.subset("train", role)
        total = [torch.zeros_like(p) for p in names.values()]
        for row in range(len(dataset)):
            loss = method.model.eval().loss(dataset[[row]]).sum()
            for value, g in zip(total, torch.autograd.grad(loss, [*names.values()]), strict=True):
                value += g.square() / len(dataset)
        squares[role] = total
    expected = torch.cat(
        [
            (((f + 1e-15) / (r + 1e-15) >= 1) & (f > 0)).reshape(-1) & ("_proj" in name)
            for name, f, r in zip(names, *squares.values(), strict=True)
        ]
    )
    assert (method.salient() == expected).double().mean() > 0.995


def test_every_forgotten_sample_is_ascended_on_once_per_epoch(shared):
    method = Recorder(shared)
    data = named_patterns(pictures=10, batch_size=1, view="paired")
    quiet_trainer(max_epochs=2).fit(method, datamodule=data)
    forget, retain = (len(data.subset("train", role)) for role in ("forget", "retain"))
    half = len(method.steps) // 2
    for epoch in (method.steps[:half], method.steps[half:]):
        seen = [i for phase, ids in epoch if phase == "ascent" for i in ids]
        assert len(seen) == len(set(seen)) == forget == 2
        assert [phase for phase, _ in epoch].count("descent") == retain == 23
        places = [number for number, (phase, _) in enumerate(epoch) if phase == "ascent"]
        assert places == [0, 12]  # before every eleventh descent
    # the passes for the mask, two epochs of ascents and descents
    assert method.sample_passes.tolist() == [[0, 3 * forget], [0, 3 * retain]]


def test_a_mask_without_weights_is_refused(shared):
    with pytest.raises(NoOpError, match="lower `threshold`"):
        fitted(MMUnlearner(shared, threshold=1e30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": "vison"}, "did you mean 'vision'"),
        ({"mask_scope": "all"}, "`mask_scope` is 'all'"),
        ({"missing": "frozen"}, "did you mean 'freeze'"),
        ({"fisher": "samples"}, "did you mean 'sample'"),
        ({"threshold": 0.0}, "`threshold` is 0.0"),
        ({"clip": 0.0}, "`clip` is 0.0"),
    ],
)
def test_bad_settings(shared, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        MMUnlearner(shared, **settings)
