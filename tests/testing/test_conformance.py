"""The conformance suite itself: it lets good methods pass and names what is wrong with bad ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.methods import Identity, NegGradPlus
from mmforget.methods.base import ForgettingMethod
from mmforget.models import ImageClassifier
from mmforget.testing.conformance import (
    MethodChecks,
    check_method,
    check_model,
    pattern_data,
    whole,
)
from mmforget.testing.patterns import pattern_model


class Honest(NegGradPlus):
    """A third party's method, without any fault."""

    def __init__(self, model, **settings):
        super().__init__(model, **({"lr": 2e-3, "alpha": 0.8} | settings))


class Lazy(Honest):
    """Does nothing."""

    def losses(self, batch):
        return {name: 0 * value for name, value in super().losses(batch).items()}


class Careless(Honest):
    """Forgets to look after the retain set."""

    def losses(self, batch):
        return {"forget": 30 * super().losses(batch)["forget"]}


class Thief(Honest):
    """Reads labels that it does not declare."""

    access: ClassVar[DataAccess] = DataAccess(forget_labels=False)


class Random(Honest):
    """Draws from the operating system."""

    def losses(self, batch):
        noise = torch.rand((), generator=torch.Generator().manual_seed(torch.seed()))
        return {name: noise * value for name, value in super().losses(batch).items()}


class Forgetful(Honest):
    """Keeps a running weight where no checkpoint finds it."""

    def __init__(self, model):
        super().__init__(model)
        self.weight = 1.0

    def losses(self, batch):
        self.weight *= 0.9
        return {name: self.weight * value for name, value in super().losses(batch).items()}


class Local(Honest):
    """Divides by the local number of samples, weighing processes and not samples."""

    def __init__(self, model):
        super().__init__(model, optimizer="sgd", lr=0.05)

    def global_mean(self, values: Tensor, weight: Tensor) -> Tensor:
        return (values * weight).sum() / weight.sum()


class Blind(Honest):
    """Takes a loss that is not finite for zero."""

    def losses(self, batch):
        return {name: value.nan_to_num() for name, value in super().losses(batch).items()}


class InPlace(Honest):
    """Works on the given model."""

    def __init__(self, model):
        super().__init__(model, copy=False)


class Meddler(Honest):
    """Copies, but writes to the given model in the end."""

    def edit(self):
        next(self._given[0].parameters()).zero_()


class Renamer(Honest):
    """Leaves a wrapper in the result."""

    def edit(self):
        self.model.network.norm = nn.Sequential(self.model.network.norm)


class Undeclared(ForgettingMethod):
    """Needs a head and does not say so."""

    def __init__(self, model):
        super().__init__(model)
        self.size = model.head.weight.shape


class Sham(Identity):
    """Changes nothing and calls it forgetting."""

    expects_change: ClassVar[bool] = True


def test_a_good_method_passes():
    check_method(Honest)


@pytest.mark.parametrize(
    ("method", "check", "message"),
    [
        (Lazy, "effect", "Lazy changed no parameter: it is a no-op"),
        (Sham, "effect", "Sham changed no parameter: it is a no-op"),
        (Careless, "effect", "Careless does not retain: accuracy on the retain set went from 1"),
        (lambda m: Honest(m, lr=1e-6), "effect", "Honest does not forget: accuracy on the forget"),
        (Thief, "access", "Thief reads data that it does not declare in `access`"),
        (Random, "determinism", "Random gives different weights with the same seed"),
        (Forgetful, "resume", "Forgetful ends with other weights when it is killed and resumed"),
        (Local, "processes", "Local gives other weights on two processes than on one"),
        (Blind, "divergence", "Blind trains on through a loss that is not finite"),
        (InPlace, "given_model", "InPlace edits a small model in place"),
        (Meddler, "given_model", "Meddler changes the given model in `finalize`"),
        (Renamer, "saving", "Renamer returns a model whose parameters are named otherwise"),
        (Undeclared, "capabilities", "Undeclared fails on a bare model with AttributeError"),
    ],
)
def test_bad_methods_are_found_out(method, check, message):
    with pytest.raises(AssertionError) as caught:
        MethodChecks(method).run(check)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_original_must_know_what_is_to_be_forgotten():
    def untrained():
        return pattern_model().fresh(0)

    with pytest.raises(AssertionError, match="train it better"):
        MethodChecks(Honest, model=untrained).run("effect")


# ---- models -------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return whole(pattern_data().subset("test", "retain"))


def test_a_good_model_passes(batch):
    check_model(pattern_model(), batch)


def test_a_network_of_the_user_passes(batch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 5))
    model = ImageClassifier(copy.deepcopy(network), num_classes=5).eval()

    def load(folder: Path) -> ImageClassifier:
        weights = next(folder.glob("*.safetensors"))
        return ImageClassifier(copy.deepcopy(network), num_classes=5, weights=weights)

    check_model(model, batch, load=load, rebuilds=False)


class MeanLoss(ImageClassifier):
    def loss(self, batch, features=None):
        return super().loss(batch, features).mean()


class Mixed(ImageClassifier):
    def forward(self, images):
        scores = super().forward(images)
        return scores - scores.mean(0)


class Inherits(ImageClassifier):
    def fresh(self, seed):
        model = super().fresh(seed)
        model.network.blocks.load_state_dict(self.network.blocks.state_dict())
        return model


class LosesAWeight(ImageClassifier):
    def save_native(self, folder):
        smaller = copy.deepcopy(self)
        smaller.__class__ = ImageClassifier
        torch.nn.init.zeros_(smaller.head.bias)
        smaller.save_native(folder)


class Doubled(ImageClassifier):
    def sites(self, kind):
        return super().sites(kind) * 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MeanLoss, "MeanLoss.loss returns () instead of one value per sample"),
        (Mixed, "Mixed.logits of a sample depends on the other samples of its batch"),
        (Inherits, "Inherits.fresh inherits trained weights of the model"),
        (LosesAWeight, "LosesAWeight: the loaded weights differ from those that were saved"),
        (Doubled, "Doubled.sites('ffn') names a layer twice"),
    ],
)
def test_bad_models_are_found_out(kind, message, batch):
    model = pattern_model()
    model.__class__ = kind
    with pytest.raises(AssertionError) as caught:
        check_model(model, batch)
    assert message in str(caught.value)
