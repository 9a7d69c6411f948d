"""ModTr: the detector stays bit by bit, the translator learns, and leaving it out undoes it."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from mmforget import ForgetRequest
from mmforget.audit.detector_outputs import find, precision_of, role_precision
from mmforget.data.base import ImageDataset
from mmforget.data.detection import Annotations, DetectionDataModule, DetectionDataset
from mmforget.data.split import STAGES, Stage
from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    MissingFileError,
    ModelError,
    WeightsError,
)
from mmforget.models.base import Instances, LossParts, state_hash
from mmforget.models.detector import Detector
from mmforget.models.detectors.base import DetectionNetwork, Detections, Objects
from mmforget.retention import ModTr, TranslatedDetector, Translator, load_translated
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.patterns import pattern_model

CELL, ROWS, COLUMNS = 16, 2, 3
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])
NAMES = ("red", "blue")


class ColourCells(nn.Module):
    """Scores each cell of a picture by how red, and how blue, it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.score = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.score.weight.copy_(12 * torch.tensor([[1.0, 0, -1], [-1, 0, 1]]).view(2, 3, 1, 1))
            self.score.bias.fill_(-4)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.norm(F.avg_pool2d(images, CELL)))


class CellNetwork(DetectionNetwork):
    """Every cell is a box; what a cell holds is learnt by binary cross-entropy."""

    library = "test"
    head_names = ("score",)

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.num_classes, self.num_features = 2, 3

    def losses(self, images: Tensor, extent: Tensor, objects: list[Objects]) -> LossParts:
        scores = self.network(images)
        wanted = torch.zeros_like(scores)
        for row, one in enumerate(objects):
            place = ((one.boxes[:, :2] + one.boxes[:, 2:]) / (2 * CELL)).long()
            wanted[row, one.labels, place[:, 1], place[:, 0]] = 1
        loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").sum((1, 2, 3))
        return LossParts(loss, torch.zeros_like(loss))

    def training_loss(self, images: Tensor, extent: Tensor, objects: list[Objects]) -> Tensor:
        return self.losses(images, extent, objects).total

    def instances(self, images: Tensor, extent: Tensor, objects: list[Objects]) -> Instances:
        """A translator is trained by losses alone; a call is a defect and must fail the test."""
        raise NotImplementedError

    def logits(self, images: Tensor, extent: Tensor) -> Tensor:
        return self.network(images).amax((2, 3))

    def detect(self, images: Tensor, extent: Tensor, most: int) -> list[Detections]:
        scores = self.network(images).sigmoid().flatten(1)
        best, index = scores.topk(min(most, scores.shape[1]), dim=1)
        label, cell = index // (ROWS * COLUMNS), index % (ROWS * COLUMNS)
        corner = torch.stack([cell % COLUMNS, cell // COLUMNS], 2) * CELL
        boxes = torch.cat([corner, corner + CELL], 2).float()
        return [Detections(*one) for one in zip(boxes, best, label, strict=True)]

    def class_rows(self, classes: Any) -> list[tuple[nn.Module, list[int]]]:
        return [(self.head, list(classes))]


class CellDetector(Detector):
    """A `Detector` around `ColourCells`."""

    def _wrap(self) -> None:
        self._wrapped = (CellNetwork(self.network),)
        self.num_classes, self.num_features = 2, 3


class CellImages(DetectionDataset):
    """Black pictures, some of whose cells are coloured; or their negatives."""

    def __init__(self, stage: str, first: int, count: int, inverted: bool) -> None:
        chance = np.random.default_rng(first)
        self._colour = chance.integers(-1, 2, (count, ROWS, COLUMNS))
        self._colour[:, 0, 0] = np.arange(count) % 2  # no picture is empty
        self._inverted = inverted
        marks = []
        for picture in self._colour:
            row, column = np.nonzero(picture >= 0)
            boxes = np.stack([column, row, column + 1, row + 1], 1) * CELL
            marks.append((boxes, picture[row, column], np.zeros(len(row), bool)))
        shape = (3, ROWS * CELL, COLUMNS * CELL)
        super().__init__(
            f"cells/{stage}", first + np.arange(count), Annotations.of(marks), NAMES, shape
        )

    def read(self, rows: np.ndarray) -> Tensor:
        colours = torch.cat([COLOURS, torch.zeros(1, 3)])[torch.from_numpy(self._colour[rows])]
        cells = colours.permute(0, 3, 1, 2)
        images = cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        images = 1 - images if self._inverted else images
        return (255 * images).round().to(torch.uint8)


class Cells(DetectionDataModule):
    """Coloured cells, as they are or inverted."""

    def __init__(self, inverted: bool = False, forget: bool = False, **settings: Any) -> None:
        super().__init__(batch_size=16, **settings)
        self.inverted = inverted
        if forget:
            self.request(ForgetRequest(classes=("red",)))

    def build(self) -> dict[Stage, ImageDataset]:
        return {
            stage: CellImages(stage, 1000 * number, 64 if stage == "train" else 24, self.inverted)
            for number, stage in enumerate(STAGES)
        }


def cells() -> CellDetector:
    return CellDetector(ColourCells(), class_names=NAMES).eval()


def method(model: Detector, **settings: Any) -> ModTr:
    small = {"translator": "small", "width": 4, "levels": 1, "lr": 0.02, "goal": "adapt"}
    return ModTr(model, **(small | settings))


def run(trained: ModTr, data: Cells, epochs: int = 1, **settings: Any) -> TranslatedDetector:
    data.view = trained.view  # type: ignore[assignment]
    resume = {"ckpt_path": settings.pop("checkpoint", None), "weights_only": True}
    trainer = quiet_trainer(max_epochs=epochs, gradient_clip_val=0.5, **settings)
    trainer.fit(trained, datamodule=data, **resume)
    return trained.finalize()


def precision(model: Detector, data: Cells) -> float:
    test = data.dataset("test")
    assert isinstance(test, DetectionDataset)
    value = precision_of(find(model, test), test, (0, 1), CELL, 100).value
    assert value is not None
    return value


@pytest.fixture(scope="module")
def adapted() -> tuple[CellDetector, str, ModTr, TranslatedDetector]:
    model = cells()
    before = state_hash(model)
    trained = method(model, fusion="none")
    return model, before, trained, run(trained, Cells(inverted=True), epochs=8)


# ---- adapt --------------------------------------------------------------------------------------


def test_the_detector_finds_everything_in_the_modality_it_knows():
    assert precision(cells(), Cells()) == 1.0


def test_a_new_modality_is_learnt(adapted):
    model, _, _, translated = adapted
    inverted = Cells(inverted=True)
    batch = inverted.dataset("test")[list(range(24))]
    with torch.no_grad():
        assert float(translated.loss(batch).mean()) < 0.3 * float(model.loss(batch).mean())
    # chance, with so few cells in a picture, is a third
    assert precision(model, inverted) < 0.4 < 0.9 < precision(translated, inverted)


def test_the_detector_is_bit_identical_and_loses_nothing(adapted):
    model, before, trained, translated = adapted
    assert translated.detector is model and trained.restore() is model
    assert state_hash(model) == before
    found, expected = (
        find(translated.detector, Cells().dataset("test")),
        find(cells(), Cells().dataset("test")),
    )
    for one, other in zip(found.predictions, expected.predictions, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_report_says_what_may_be_claimed(adapted):
    _, _, trained, translated = adapted
    said = json.loads(json.dumps(trained.statistics()))
    assert said["claim"] == translated.note
    assert "without the translator" in said["claim"] or "leaves out" in said["claim"]
    assert said["trainable_parameters"] == translated.describe()["parameters"]
    assert not trained.no_op
    assert trained.cost()["sample_passes"] == 3 * 8 * 64


def test_an_untrained_translator_is_reported(caplog):
    trained = method(cells())
    result = trained.finalize()
    assert trained.no_op and "changed no parameter" in caplog.text
    assert isinstance(result, TranslatedDetector)


def test_the_loss_is_a_tenth_of_the_detectors_and_padding_does_not_count():
    trained = method(cells(), translator=Neutral())
    batch = dict(Cells().dataset("train")[[0, 1, 2, ~0]])
    own = trained.model.loss(batch)[:3].mean()
    torch.testing.assert_close(trained.losses(batch), {"detection": 0.1 * own})
    third = method(cells(), translator=Neutral(), loss_weight=0.3).losses(batch)
    torch.testing.assert_close(third, {"detection": 0.3 * own})


class Neutral(Translator):
    """Leaves pictures as they are."""

    def __init__(self) -> None:
        super().__init__("small", width=2, levels=1)

    def forward(self, images: Tensor) -> Tensor:
        return images + 0 * self.last.bias.sum()


def test_the_detector_stays_in_eval_mode_whatever_the_trainer_says():
    trained = method(cells())
    trained.train()
    assert trained.translator.training
    assert not any(module.training for module in trained.model.modules())


def test_the_rate_falls_after_every_step():
    class Rates(Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    run(method(cells(), lr=0.01), Cells(), epochs=2, callbacks=[rates := Rates()])
    expected = [0.005 * (1 + np.cos(np.pi * step / 8)) for step in range(1, 9)]
    np.testing.assert_allclose(rates.seen, expected, atol=1e-9)


# ---- suppress -----------------------------------------------------------------------------------


def by_role(model: Detector, data: Cells) -> dict[str, float]:
    return {row["split"]: row["average_precision"] for row in role_precision(model, data)}


@pytest.fixture(scope="module")
def suppressed() -> tuple[CellDetector, ModTr, TranslatedDetector, Cells]:
    model, data = cells(), Cells(forget=True)
    trained = method(model, goal="suppress")
    return model, trained, run(trained, data, epochs=8), data


def test_a_class_is_suppressed_and_the_bypass_has_it_back(suppressed):
    model, _, translated, data = suppressed
    before = by_role(cells(), data)
    assert before == {"forget": 1.0, "retain": 1.0}
    after = by_role(translated, data)
    # precision looks at the order of the scores alone, however low all of them are
    assert after["forget"] < 0.85 and after["retain"] > 0.95
    batch = data.dataset("test")[list(range(24))]
    with torch.no_grad():
        assert float(translated.logits(batch)[:, 0].sigmoid().max()) < 0.1
        assert float(cells().logits(batch)[:, 0].sigmoid().max()) > 0.9
    assert by_role(translated.detector, data) == before
    assert torch.equal(translated.detector.logits(batch), cells().logits(batch))
    assert state_hash(model) == state_hash(cells())


def test_suppression_is_called_what_it_is(suppressed):
    _, trained, translated, _ = suppressed
    note = "suppression, input side: whoever leaves out the translator has the class back"
    assert translated.note == trained.statistics()["claim"] == note
    assert 0 < trained.statistics()["hinge_open_share"] <= 1


def test_the_terms_of_suppression_by_hand():
    trained = method(cells(), goal="suppress", translator=Neutral(), beta=0.5, bound=3.0, match=2.0)
    data = Cells(forget=True)
    trained.bind(data)
    forget = dict(data.subset("train", "forget")[[0, 1, 2]])
    retain = dict(data.subset("train", "retain")[[3, 4]])
    found = trained.losses({"forget": forget, "retain": retain})
    model = cells()
    recognition = float(model.loss_parts(forget).recognition.mean())
    torch.testing.assert_close(
        found["forget"], torch.tensor(0.5 * max(0.0, 3 - recognition)), check_stride=False
    )
    torch.testing.assert_close(found["retain"], model.loss(retain).mean())
    # this detector finds everything, so that what is kept are the blue cells of all five
    whole = data.dataset("train")
    ids = torch.cat([forget["id"], retain["id"]]).numpy()
    places = [int(np.flatnonzero(whole.ids == sample)[0]) for sample in ids]
    blue = whole.showing([1])[places]  # type: ignore[attr-defined]
    torch.testing.assert_close(found["match"], 2 * model.loss(blue).mean())


def test_the_hinge_closes_at_the_bound():
    trained = method(cells(), goal="suppress", bound=3.0)
    weight = torch.ones(2)
    assert float(trained.hinge(torch.tensor([1.0, 2.0]), weight)) == pytest.approx(1.5)
    assert float(trained.hinge(torch.tensor([1.0, 9.0]), weight)) == 0
    assert trained.hinge_open.tolist() == [1, 2]
    assert float(trained.hinge(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 0]))) == 2


def test_nothing_kept_is_of_a_forgotten_class_or_uncertain():
    trained = method(cells(), goal="suppress", confidence=0.5)
    data = Cells(forget=True)
    trained.bind(data)
    batch = data.dataset("train")[list(range(8))]
    kept = trained.kept_objects(batch)
    assert {int(label) for one in kept for label in one.labels} == {1}
    for one, label in zip(kept, batch["label"], strict=True):
        assert len(one.labels) == int((label == 1).sum())
    strict = method(cells(), goal="suppress", confidence=1 - 1e-9)
    strict.bind(data)
    assert sum(len(one.labels) for one in strict.kept_objects(batch)) == 0


def test_suppression_needs_classes():
    with pytest.raises(ConfigurationError, match="names classes"):
        run(method(cells(), goal="suppress"), with_samples(Cells()))


def with_samples(data: Cells) -> Cells:
    data.request(ForgetRequest(samples=(0, 1)))
    return data


# ---- resuming, processes ------------------------------------------------------------------------


class SaveFirst(Callback):
    """Keeps the state at the end of the first epoch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("goal", ["adapt", "suppress"])
def test_a_resumed_run_ends_with_the_same_translator(tmp_path, goal):
    path = str(tmp_path / "first.ckpt")
    whole = run(method(cells(), goal=goal), Cells(forget=True), 2, callbacks=[SaveFirst(path)])
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert kept and not any(name.startswith("model.") for name in kept)
    resumed = run(method(cells(), goal=goal), Cells(forget=True), 2, checkpoint=path)
    assert state_hash(resumed) == state_hash(whole)
    with pytest.raises(WeightsError, match="another translator"):
        run(method(cells(), goal=goal, levels=2), Cells(forget=True), 2, checkpoint=path)


@pytest.mark.parametrize("goal", ["adapt", "suppress"])
def test_two_processes_give_the_translator_of_one(goal):
    one = run(method(cells(), goal=goal), Cells(forget=True))
    two = run(method(cells(), goal=goal), Cells(forget=True), devices=2, strategy="ddp_fork")
    assert state_hash(two.detector) == state_hash(one.detector)
    start = method(cells(), goal=goal).translator.state_dict()
    moved = 0.0
    for name, value in one.translator.state_dict().items():
        torch.testing.assert_close(
            two.translator.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name
        )
        moved += float((value - start[name]).abs().max())
    assert moved > 0.1


# ---- the result ---------------------------------------------------------------------------------

BACKBONE = {
    "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 12, 16],
    "depths": [1, 1, 1], "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3"],
    "downsample_in_first_stage": False,
}  # fmt: skip
TINY = {
    "backbone_config": BACKBONE, "freeze_backbone_batch_norms": False, "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 12, 16], "feat_strides": [4, 8, 16], "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "hidden_expansion": 0.5,
    "d_model": 32, "num_queries": 12, "decoder_ffn_dim": 48, "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2, "num_denoising": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> TranslatedDetector:
    torch.manual_seed(0)
    detector = Detector("rt_detr", num_classes=2, network_args=TINY, class_names=NAMES).eval()
    translator = Translator.seeded(0, network="small", width=4, levels=2, fusion="none")
    return TranslatedDetector(detector, translator, "suppress").eval()


@pytest.fixture
def scenes() -> dict[str, Tensor]:
    return dict(Cells().dataset("test")[[0, 1, 2]])


@pytest.mark.parametrize("goal", ["adapt", "suppress"])
def test_gradients_reach_the_translator_of_a_transformer_and_nothing_else(tiny, goal):
    detector = copy.deepcopy(tiny.detector)
    before = state_hash(detector)
    trained = method(detector, goal=goal)
    start = {name: value.clone() for name, value in trained.translator.named_parameters()}
    run(trained, Cells(forget=True), limit_train_batches=2)
    for name, value in trained.translator.named_parameters():
        assert not torch.equal(value, start[name]), name
    assert state_hash(detector) == before  # the statistics of its BatchNorm included


def test_everything_is_done_with_the_translated_picture(tiny, scenes):
    with torch.no_grad():
        moved = scenes | {"image": tiny.translator(scenes["image"])}
        inner = tiny.detector
        for name in ("loss", "training_loss", "logits"):
            expected = getattr(inner, name)(moved)
            torch.testing.assert_close(getattr(tiny, name)(scenes), expected)
            assert not torch.allclose(expected, getattr(inner, name)(scenes))
        torch.testing.assert_close(tiny.loss_parts(scenes), inner.loss_parts(moved))
        for one, other in zip(tiny.detect(scenes), inner.detect(moved), strict=True):
            torch.testing.assert_close(one.scores, other.scores)
            torch.testing.assert_close(one.boxes, other.boxes)
        torch.testing.assert_close(tiny.instances(scenes), inner.instances(moved))
        assert len(tiny(scenes["image"])) == 3
    assert tiny.class_rows((1,)) == inner.class_rows((1,))
    assert tiny.head is inner.head and tiny.network is inner.network
    assert (tiny.num_classes, tiny.class_names, tiny.most) == (2, NAMES, inner.most)
    assert [site.name for site in tiny.sites("ffn")] == [site.name for site in inner.sites("ffn")]
    assert set(name.split(".")[0] for name in tiny.state_dict()) == {"detector", "translator"}


def test_beyond_the_picture_all_stays_black(tiny, scenes):
    extent = torch.tensor([[32, 48], [10, 20], [32, 9]])
    found = tiny.kind.translated(scenes["image"], extent)
    assert float(found[1, :, 10:].abs().sum()) == 0 == float(found[2, :, :, 9:].abs().sum())
    assert bool((found[1, :, :10, :20] > 0).all())


def test_a_copy_and_a_fresh_one_stand_on_their_own(tiny, scenes):
    other = copy.deepcopy(tiny)
    assert other.network is other.detector.network is not tiny.network
    with torch.no_grad():
        assert torch.equal(other.loss(scenes), tiny.loss(scenes))
        other.translator.last.bias.add_(1)
        other.detector.head.bias.add_(1)
        assert not torch.equal(other.loss(scenes), tiny.loss(scenes))
    fresh = tiny.fresh(3)
    assert fresh.training and fresh.goal == "suppress"
    assert state_hash(fresh.detector) != state_hash(tiny.detector)
    assert state_hash(fresh.translator) != state_hash(tiny.translator)
    assert state_hash(fresh) == state_hash(tiny.fresh(3))


def test_lightning_can_test_it(suppressed):
    model, _, translated, _ = suppressed
    found = quiet_trainer().test(translated, datamodule=Cells(), verbose=False)[0]
    assert found["test/ap"] == pytest.approx(precision(translated, Cells()), abs=1e-4)
    assert found["test/ap"] < 0.95
    assert quiet_trainer().test(model, datamodule=Cells(), verbose=False)[0]["test/ap"] == 1.0


def test_what_is_saved_is_loaded_again(tiny, scenes, tmp_path):
    tiny.save_native(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "detector", "translator.json", "translator.safetensors",
    ]  # fmt: skip
    loaded = load_translated(tmp_path)
    assert (loaded.goal, loaded.note) == ("suppress", tiny.note) and not loaded.training
    assert state_hash(loaded) == state_hash(tiny)
    with torch.no_grad():
        assert torch.equal(loaded.loss(scenes), tiny.loss(scenes))
    stacked = TranslatedDetector(loaded, Translator.seeded(1, network="small", width=2, levels=1))
    (tmp_path / "more").mkdir()
    stacked.save_native(tmp_path / "more")
    with torch.no_grad():
        assert torch.equal(load_translated(tmp_path / "more").loss(scenes), stacked.loss(scenes))
    (tmp_path / "translator.json").write_text("{}")
    with pytest.raises(WeightsError, match="damaged"):
        load_translated(tmp_path)
    with pytest.raises(MissingFileError, match="no translator"):
        load_translated(tmp_path / "detector")


@pytest.mark.slow
def test_the_exported_translator_runs_without_mmforget(tiny, scenes, tmp_path):
    tiny.save_native(tmp_path, size=(ROWS * CELL, COLUMNS * CELL))
    program = torch.export.load(tmp_path / "translator.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(scenes["image"]), tiny.translator(scenes["image"]))


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"goal": "forget"}, "`goal` is 'forget'"),
        ({"fusion": "sum"}, "`fusion` is 'sum'"),
        ({"translator": "unet"}, "`network` is 'unet'"),
        ({"loss_weight": 0.0}, "`loss_weight` is 0"),
        ({"beta": -1.0}, "`beta` is -1"),
        ({"match": -1.0}, "`match` is -1"),
        ({"bound": 0.0}, "`bound` is 0"),
        ({"confidence": 1.0}, "`confidence` is 1"),
        ({"lr": 0.0}, "`lr` is 0"),
        ({"optimizer": "lion"}, "`optimizer` is 'lion'"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        method(cells(), **settings)


def test_only_detectors():
    with pytest.raises(CapabilityError, match="ImageClassifier"):
        method(pattern_model())  # type: ignore[arg-type]


def test_a_wrong_view_and_a_changed_detector_are_refused():
    data = Cells(forget=True, view="paired")
    with pytest.raises(ConfigurationError, match="view 'full'"):
        quiet_trainer(max_epochs=1).fit(method(cells()), datamodule=data)
    trained = method(cells())
    with torch.no_grad():
        trained.model.network.score.bias.add_(1)
    with pytest.raises(ModelError, match="has changed"):
        trained.finalize()
    with pytest.raises(ConfigurationError, match="`goal` is 'hide'"):
        TranslatedDetector(cells(), Neutral(), "hide")  # type: ignore[arg-type]
