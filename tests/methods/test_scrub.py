"""SCRUB: the teacher stays, the two kinds of steps alternate, modes are right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmforget.errors import ConfigurationError
from mmforget.methods import SCRUB
from mmforget.models import ImageClassifier, state_hash
from mmforget.request import ForgetRequest
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.patterns import PatternData, pattern_model


@pytest.fixture
def model() -> ImageClassifier:
    return pattern_model()


class Recorder(SCRUB):
    """Writes down each step: kind, sample ids, and whether BatchNorm is in training mode."""

    def losses(self, batch):
        if not hasattr(self, "steps"):
            self.steps = []
        part = batch["forget" if self._phase == "max" else "retain"]
        modes = {m.training for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)}
        self.steps.append((self._phase, part["id"].tolist(), modes))
        return super().losses(batch)


def fitted(method: SCRUB, epochs: int, batch_size: int = 16, classes=(1,)) -> SCRUB:
    data = PatternData(batch_size=batch_size, view="paired")
    data.request(ForgetRequest(classes=classes))
    quiet_trainer(max_epochs=epochs).fit(method, datamodule=data)
    return method


def test_the_teacher_is_the_original_and_stays_it(model):
    method = fitted(SCRUB(model, lr=1e-2), epochs=1)
    assert state_hash(method.teacher) == state_hash(model)
    assert state_hash(method.model) != state_hash(model)
    assert not any(m.training for m in method.teacher.modules())


@pytest.mark.parametrize("classes", [(1,), (0, 1, 2)])  # fewer and more than are retained
def test_every_epoch_shows_every_forgotten_sample_once_in_max_steps(model, classes):
    method = fitted(Recorder(model, forget_epochs=1), epochs=2, classes=classes)
    half = max(i for i, (kind, _, _) in enumerate(method.steps) if kind == "max")
    seen = [i for kind, ids, _ in method.steps for i in ids if kind == "max"]
    assert len(seen) == len(set(seen)) == 31 * len(classes)
    assert [kind for kind, _, _ in method.steps[: half + 2]] == ["max", "min"] * (half // 2 + 1)
    retained = [i for kind, ids, _ in method.steps for i in ids if kind == "min"]
    assert len(set(retained)) == 31 * (5 - len(classes))


def test_every_step_moves_the_weights_and_is_counted(model):
    method = fitted(SCRUB(model), epochs=1)
    assert method.global_step == 2 + 8  # 31 forgotten in 2 steps, 124 retained in 8
    assert method.sample_passes.tolist() == [[31, 31], [124, 124]]


def test_batch_norm_learns_in_min_steps_only():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)
    )
    model = ImageClassifier(network, num_classes=5)
    method = fitted(Recorder(model, freeze_bn=False), epochs=1)
    assert {(kind, *modes) for kind, _, modes in method.steps} == {("max", False), ("min", True)}
    frozen = fitted(Recorder(model), epochs=1)
    assert all(modes == {False} for _, _, modes in frozen.steps)
    assert torch.equal(frozen.model.network[1].running_mean, model.network[1].running_mean)


def test_the_divergence_has_the_temperature_squared(model):
    method = SCRUB(model, temperature=3.0, w_ce=0.5, w_kl=2.0)
    with torch.no_grad():
        method.model.head.weight.mul_(2)
    data = PatternData()
    batch = data.dataset("train")[[0, 1, 2]]
    terms = method.losses({"retain": batch, "forget": batch})
    teacher = (model.logits(batch) / 3).softmax(-1)
    student = (method.model.logits(batch) / 3).softmax(-1)
    apart = 9 * (teacher * (teacher / student).log()).sum(-1).mean()
    torch.testing.assert_close(terms["teacher"], 2 * apart)
    torch.testing.assert_close(terms["retain"], 0.5 * method.model.loss(batch).mean())
    method._phase = "max"
    torch.testing.assert_close(method.losses({"retain": batch, "forget": batch})["forget"], -apart)


def test_bad_settings(model):
    with pytest.raises(ConfigurationError, match=r"`temperature` is 0"):
        SCRUB(model, temperature=0)
    with pytest.raises(ConfigurationError, match=r"`forget_epochs` is 0"):
        SCRUB(model, forget_epochs=0)
