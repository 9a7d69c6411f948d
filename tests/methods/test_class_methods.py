"""ClassRerouting and ClassDistillation: finding classes and tables, and what they change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.erase import run_method
from mmforget.errors import CapabilityError, ConfigurationError, RequestError
from mmforget.methods.class_distillation import ClassDistillation
from mmforget.methods.class_rerouting import ClassRerouting
from mmforget.methods.class_target import classes_of
from mmforget.models.base import state_hash
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN
from mmforget.models.generators.class_tables import (
    class_tables,
    mixed_classes,
    same_classes,
)
from mmforget.testing.colour_world import COLOURS, ColourClip, colour_gan

RED = ConceptSpec("red")
OTHERS = ["green", "blue"]


def guide() -> ConceptGuide:
    return ConceptGuide([ColourClip()], [RED], {"red": OTHERS})


def of_class(model: ImageGAN, name: str, n: int = 16) -> Tensor:
    return model.generate([name], n, seed=3)


def redness(images: Tensor) -> float:
    return float((guide().probabilities(images) > 0.5).double().mean())


class Concatenating(nn.Module):
    """Reads the class as a one-hot row beside the latent."""

    latent_size, num_classes = 5, 3

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.layer: nn.Module
        if convolution:
            self.layer = nn.ConvTranspose2d(8, 3, 4, bias=False)
        else:
            self.layer = nn.Linear(8, 3 * 16)
        self.convolution = convolution

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat([latents, labels], dim=1)
        if self.convolution:
            return torch.tanh(self.layer(both[:, :, None, None]))
        return torch.tanh(self.layer(both)).view(-1, 3, 4, 4)


class Squared(Concatenating):
    """The class enters a second time, in a way that no row can follow."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return super().forward(latents, labels) * (1 + labels.argmax(1))[:, None, None, None] / 3


# ---- tables -------------------------------------------------------------------------------------


def test_tables_of_a_conditional_dcgan_are_its_scales_and_shifts():
    model = ImageGAN(
        "dcgan",
        {"latent_size": 4, "channels": (8, 6), "num_classes": 3},
        class_names=("a", "b", "c"),
    )
    assert [table.parameter for table in class_tables(model)] == [
        f"norms.{number}.{part}.weight" for number in (0, 1) for part in ("scale", "shift")
    ]


@pytest.mark.parametrize("convolution", [False, True])
def test_one_hot_labels_beside_the_latent_are_found_by_their_place(convolution):
    model = ImageGAN(Concatenating(convolution), label_format="one_hot")
    (table,) = class_tables(model)
    assert (table.name, table.first, table.classes) == ("layer", 5, 3)
    weight = model.network.layer.weight
    expected = weight[5:] if convolution else weight[:, 5:].T
    torch.testing.assert_close(table.rows, expected.flatten(1))


def test_a_generator_without_classes_has_no_tables():
    with pytest.raises(CapabilityError, match="0 classes"):
        class_tables(colour_gan())


def test_a_computed_weight_is_no_table():
    model = colour_gan(classes=True)
    nn.utils.parametrizations.spectral_norm(model.network.classes)
    with pytest.raises(CapabilityError, match="fold"):
        class_tables(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["table", "concatenated"])
def test_a_mixture_of_one_class_is_that_class(kind):
    model = (
        colour_gan(classes=True)
        if kind == "table"
        else ImageGAN(Concatenating(True), label_format="one_hot")
    )
    latents = model.draw(4, 0)
    pure = torch.eye(3)[[2, 2, 2, 2]]
    with mixed_classes(class_tables(model), pure):
        mixed = model.synthesise(latents)
    torch.testing.assert_close(mixed, model.synthesise(same_classes(latents, 2)))
    assert not torch.equal(mixed, model.synthesise(latents))  # the hooks are gone


# ---- which class --------------------------------------------------------------------------------


def test_a_class_is_found_by_one_of_its_names():
    model = colour_gan(classes=True)
    model.class_names = ("crimson, Red", "green", "blue")
    assert classes_of(model, [RED]) == {0: "red"}


def test_a_synonym_names_a_class_too():
    spec = ConceptSpec("crimson", synonyms=("blue",))
    assert classes_of(colour_gan(classes=True), [spec]) == {2: "crimson"}


def test_an_unknown_class_is_refused_with_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'green'"):
        ClassRerouting(colour_gan(classes=True), ConceptSpec("gren"))


def test_all_classes_cannot_be_erased():
    specs = [ConceptSpec(name) for name in COLOURS]
    with pytest.raises(RequestError, match="all 3 classes"):
        ClassRerouting(colour_gan(classes=True), specs)


def test_without_names_the_guide_finds_the_class():
    model = colour_gan(classes=True)
    model.class_names = ("0", "1", "2")
    method = ClassRerouting(model, ConceptSpec("blue"), [ColourClip()], ["red", "green"])
    assert method.erased == {2: "blue"}
    unseen = ConceptSpec("a giraffe")
    with pytest.raises(RequestError, match="in no class"):
        ClassRerouting(model, unseen, [ColourClip()], list(COLOURS))


# ---- rerouting ----------------------------------------------------------------------------------


def test_a_rerouted_class_draws_its_destination_and_the_others_stay_bit_by_bit():
    model = colour_gan(classes=True)
    before, start = {name: of_class(model, name) for name in COLOURS}, state_hash(model)
    method = ClassRerouting(model, RED, destination="Blue")
    after = method.finalize()
    assert redness(before["red"]) == 1 and redness(of_class(after, "red")) == 0
    torch.testing.assert_close(of_class(after, "red"), before["blue"])
    for name in OTHERS:
        assert torch.equal(of_class(after, name), before[name])
    assert method.statistics()["destinations"] == {"red": "blue"}
    assert not method.no_op
    assert state_hash(method.restore()) == start


def test_the_mean_of_all_kept_rows():
    model = colour_gan(classes=True)
    rows = model.network.classes.weight.detach().clone()
    after = ClassRerouting(model, RED, destination="mean").finalize()
    torch.testing.assert_close(after.network.classes.weight[0], rows[1:].mean(0))
    assert torch.equal(after.network.classes.weight[1:], rows[1:])


def test_an_anchor_that_names_a_class_is_the_destination():
    method = ClassRerouting(colour_gan(classes=True), ConceptSpec("red", anchor="Green"))
    assert method.destinations == {0: 1}


def test_the_nearest_row_is_taken_without_a_guide():
    model = colour_gan(classes=True)
    with torch.no_grad():
        model.network.classes.weight[2] = model.network.classes.weight[0] + 0.01
    assert ClassRerouting(model, RED).destinations == {0: 2}


def test_the_erased_class_is_no_destination():
    with pytest.raises(ConfigurationError, match="'nearest', 'mean', 'green', 'blue'"):
        ClassRerouting(colour_gan(classes=True), RED, destination="red")


def test_a_class_that_also_enters_elsewhere_is_refused_and_nothing_changes():
    model = ImageGAN(Squared(False), label_format="one_hot")
    start = state_hash(model)
    method = ClassRerouting(model, ConceptSpec("0"), copy=False, destination="2")
    with pytest.raises(CapabilityError, match="also enters elsewhere"):
        method.finalize()
    assert state_hash(model) == start


def test_one_hot_classes_are_rerouted_too():
    model = ImageGAN(Concatenating(True), label_format="one_hot")
    before = model.generate(["2"], 4)
    after = ClassRerouting(model, ConceptSpec("0"), destination="2").finalize()
    torch.testing.assert_close(after.generate(["0"], 4), before)


# ---- distillation -------------------------------------------------------------------------------


def distilled(model: ImageGAN, steps: int = 60, **settings) -> tuple[ClassDistillation, ImageGAN]:
    method = ClassDistillation(
        model, RED, pool=128, batch_size=16, retain_batch_size=32, lr=1e-2, destination="green",
        **settings,
    )  # fmt: skip
    return method, run_method(method, steps, progress=False)


def test_distillation_forgets_the_class_in_the_weights_and_not_in_its_row():
    model = colour_gan(classes=True)
    before = {name: of_class(model, name) for name in COLOURS}
    method, after = distilled(model)
    # The row is the old one, so everybody who has it gets what the tuned weights make of it.
    assert torch.equal(after.network.classes.weight, model.network.classes.weight)
    assert redness(before["red"]) == 1 and redness(of_class(after, "red")) == 0
    for name in OTHERS:
        assert float((of_class(after, name) - before[name]).abs().mean()) < 0.1
    assert method.statistics()["classes"] == {"red": "red"}


def test_tables_are_trained_on_request():
    model = colour_gan(classes=True)
    after = distilled(model, 2, train_tables=True)[1]
    assert not torch.equal(after.network.classes.weight, model.network.classes.weight)


@pytest.mark.parametrize("destination", ["random", "green"])
def test_destinations_of_latents(destination):
    method = ClassDistillation(colour_gan(classes=True), RED, destination=destination, pool=64)
    batch = {"id": torch.arange(200), "label": torch.zeros(200, dtype=torch.int64)}
    found = set(method._destined(batch).tolist())
    assert found == ({1, 2} if destination == "random" else {1})


def test_mixtures_lie_around_the_row_or_on_the_way_to_a_kept_one():
    model = colour_gan(classes=True)
    method = ClassDistillation(model, RED, destination="green", pool=64, sigma=0.0)

    class Step:
        global_step = 0

    method._trainer = Step()
    batch = {"id": torch.arange(400), "label": torch.zeros(400, dtype=torch.int64)}
    mixture, nearest = method._mixture(batch, torch.ones(400, dtype=torch.int64))
    torch.testing.assert_close(mixture.sum(1), torch.ones(400, dtype=torch.float64))
    around = mixture[:, 0] == 1
    assert 0.4 < float(around.double().mean()) < 0.6
    assert set(nearest[around].tolist()) == {1}
    rows = mixture[~around]
    assert (rows[torch.arange(len(rows)), nearest[~around]] > 0).all()
    assert ((rows > 0).sum(1) == 2).all()


def test_same_seed_same_result():
    first, second = (distilled(colour_gan(classes=True), 4)[1] for _ in range(2))
    assert state_hash(first) == state_hash(second)


@pytest.mark.parametrize("method", [ClassRerouting, ClassDistillation])
def test_a_generator_without_classes_is_refused(method):
    with pytest.raises(CapabilityError, match="TextToUnlearn"):
        method(colour_gan(), RED)


@pytest.mark.parametrize("setting", ["forget_weight", "mixture_weight", "sigma"])
def test_negative_settings_are_refused(setting):
    with pytest.raises(ConfigurationError, match=setting):
        ClassDistillation(colour_gan(classes=True), RED, **{setting: -1.0})
    with pytest.raises(ConfigurationError, match="destination"):
        ClassDistillation(colour_gan(classes=True), RED, destination="yellow")


def test_a_distance_that_needs_the_guide_says_so():
    with pytest.raises(ConfigurationError, match="needs a `guide`"):
        ClassDistillation(colour_gan(classes=True), RED, retain="embedding")
