from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import ForgetDataModule, GlobalBatchSampler, ImageDataset, View, augment
from mmforget.data.digit_world import DigitWorld
from mmforget.data.split import Stage
from mmforget.errors import AccessError, ConfigurationError, DataError, RequestError
from mmforget.request import ForgetRequest


class Noise(ImageDataset):
    """Random images; counts how often each was read."""

    def __init__(self, size: int = 20, start: int = 100, labelled: bool = True) -> None:
        labels = np.arange(size) % 2 if labelled else None
        super().__init__("noise", start + np.arange(size), labels, ("a", "b"), (3, 8, 8))
        self.reads = np.zeros(size, dtype=int)
        self.source = torch.randint(
            256, (size, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )

    def read(self, rows: np.ndarray) -> Tensor:
        self.reads[rows] += 1
        return self.source[torch.from_numpy(rows)]


class NoiseData(ForgetDataModule):
    def __init__(self, labelled: bool = True) -> None:
        super().__init__(batch_size=4)
        self.labelled = labelled

    def build(self) -> dict[Stage, ImageDataset]:
        return {
            "train": Noise(20, 100, self.labelled),
            "val": Noise(6, 200, self.labelled),
            "test": Noise(6, 300, self.labelled),
        }


class Recorder(LightningModule):
    """Writes down which samples it was given, by epoch."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.path = path
        self.seen: list[list[list[int]]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        parts = list(batch.values()) if "image" not in batch else [batch]
        for part in parts:
            self.seen[-1].append(part["id"][part["weight"] > 0].tolist())
        return self.weight.sum()

    def on_train_epoch_end(self) -> None:
        if self.path is not None:
            self.path.with_suffix(f".{self.global_rank}").write_text(json.dumps(self.seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


# ---- image data sets ----------------------------------------------------------------------------


def test_batch_has_pixels_labels_ids_and_weights() -> None:
    data = Noise()
    batch = data[[3, 0, ~3]]
    assert batch["image"].dtype == torch.float32
    assert torch.equal(batch["image"], data.source[[3, 0, 3]].float() / 255)
    assert batch["label"].tolist() == [1, 0, 1]
    assert batch["id"].tolist() == [103, 100, 103]
    assert batch["weight"].tolist() == [1, 1, 0]
    one = data[~0]
    assert one["id"].item() == 100
    assert one["weight"].item() == 0
    assert one["image"].shape == (3, 8, 8)


def test_pixels_are_read_once_and_shared_by_subsets() -> None:
    data = Noise()
    part = data.subset(np.array([7, 2, 9]))
    inner = part.subset(np.array([2, 0]))
    assert inner.ids.tolist() == [109, 107]
    assert torch.equal(inner.pixels(np.array([0, 1])), data.source[[9, 7]])
    data.pixels(np.arange(20))
    part.pixels(np.array([0, 0, 1]))
    assert (data.reads == 1).all()


def test_pixels_above_the_limit_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmforget.data.base.CACHE_LIMIT_BYTES", 100)
    data = Noise()
    for _ in range(2):
        assert torch.equal(data.pixels(np.array([4])), data.source[[4]])
    assert data.reads[4] == 2


def test_hash_depends_on_ids_labels_names_and_classes_but_not_on_views() -> None:
    data = Noise()
    other = Noise()
    other.labels = 1 - other.labels
    assert data.hash == Noise().hash == data.augmented(3).hash
    hashes = {data.hash, other.hash, data.subset(np.arange(5)).hash, data.unlabelled().hash}
    assert len(hashes) == 4


def test_doubled_ids_and_labels_out_of_range_are_refused() -> None:
    class Given(Noise):
        def __init__(self, ids: list[int], labels: list[int]) -> None:
            ImageDataset.__init__(self, "given", ids, labels, ("a", "b"), (3, 8, 8))

    with pytest.raises(DataError, match="not unique"):
        Given([1, 1], [0, 0])
    with pytest.raises(DataError, match="label 2 at id 5, but 2 classes"):
        Given([4, 5], [0, 2])
    with pytest.raises(DataError, match="label -1 at id 4"):
        Given([4, 5], [-1, 1])


# ---- augmentation -----------------------------------------------------------------------------


def test_augmentation_is_a_shift_and_a_flip_of_the_reflected_image() -> None:
    images = Noise(64).images(np.arange(64))
    ids = np.arange(64)
    result = augment(images, ids, 0, (0, 0), flip=True)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    found = set()
    for image, given in zip(result, padded, strict=True):
        matches = [
            (top, left, flipped)
            for top in range(3)
            for left in range(3)
            for flipped in (False, True)
            if torch.equal(
                image,
                (lambda crop, f: crop.flip(2) if f else crop)(
                    given[:, top : top + 8, left : left + 8], flipped
                ),
            )
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 12  # of 18


def test_augmentation_is_keyed_by_sample_epoch_and_pass_and_not_by_batch() -> None:
    data = Noise().augmented(5)
    whole, part = data[list(range(20))]["image"], data[[11, 4]]["image"]
    assert torch.equal(whole[[11, 4]], part)
    images, ids = Noise().images(np.arange(20)), np.arange(20)
    drawn = [augment(images, ids, 0, draw, True) for draw in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_digits_are_shifted_but_never_mirrored() -> None:
    images = torch.arange(32.0).expand(50, 3, 32, 32)  # grows from left to right
    result = augment(images, np.arange(50), 0, (0, 0), flip=False)
    assert (result[..., 10:20].diff(dim=-1) > 0).all()
    assert not DigitWorld(strokes=10).dataset("train").flippable


# ---- batches of several processes ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 23, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_processes_together_get_the_batches_of_one(size: int, world: int) -> None:
    def sampler(rank: int, world: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(range(size), 8, True, 3, "train", rank=rank, world=world)

    single = sampler(0, 1)
    parts = [sampler(rank, world) for rank in range(world)]
    orders = []
    for epoch in range(3):
        for one in (single, *parts):
            one.set_epoch(epoch)
        expected = list(single)
        assert sorted(p for batch in expected for p in batch) == list(range(size))
        orders.append(expected)
        batches = [list(part) for part in parts]
        assert {len(part) for part in batches} == {len(expected)} == {len(single)}
        for number, batch in enumerate(expected):
            slices = [part[number] for part in batches]
            assert len({len(piece) for piece in slices}) == 1
            real = [position for piece in slices for position in piece if position >= 0]
            assert sorted(real) == sorted(batch)
            padding = [~position for piece in slices for position in piece if position < 0]
            assert len(padding) < world
            assert set(padding) <= set(batch)
    if size > 5:
        assert orders[0] != orders[1] != orders[2]


def test_a_restarted_loader_goes_on_with_new_permutations_that_the_epoch_repeats() -> None:
    sampler = GlobalBatchSampler(range(30), 8, True)
    sampler.set_epoch(1)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(1)  # Lightning repeats it after the first iterator was made
    third = list(sampler)
    assert first != second != third != first
    assert [batch.draw for batch in second] == [(1, 1)] * 4
    sampler.set_epoch(2)
    sampler.set_epoch(1)
    assert [list(sampler), list(sampler)] == [first, second]
    assert list(GlobalBatchSampler(range(30), 8, True, epoch=1)) == first
    assert list(GlobalBatchSampler(range(30), 8, True, purpose="other", epoch=1)) != first
    assert list(GlobalBatchSampler(range(30), 8, True, seed=1, epoch=1)) != first


def test_without_shuffling_the_order_is_kept() -> None:
    assert list(GlobalBatchSampler(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(GlobalBatchSampler(range(5), 2, rank=1, world=2)) == [[1], [3], [~4]]
    assert list(GlobalBatchSampler(range(0), 2)) == []


def test_loader_workers_give_the_same_batches() -> None:
    own = DigitWorld(strokes=10, batch_size=24, augment=True)
    helped = DigitWorld(strokes=10, batch_size=24, augment=True, num_workers=2)
    loaders = own.train_dataloader(), helped.train_dataloader()
    for epoch in (0, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for left, right in zip(*loaders, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_data_module_can_be_sent_to_another_process() -> None:
    data = DigitWorld(strokes=10)
    data.request(ForgetRequest(classes=(3,)))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.split == data.split
    assert copy.dataset("test").hash == data.dataset("test").hash


# ---- views ------------------------------------------------------------------------------------


def collected(loader: object) -> list[int]:
    return [id for batch in loader for id in batch["id"].tolist()]


@pytest.mark.parametrize("view", ["full", "retain", "forget"])
def test_a_view_shows_its_samples_once_and_shuffled(view: View) -> None:
    data = DigitWorld(strokes=20, batch_size=16, view=view)
    data.request(ForgetRequest(classes=("two",)))
    expected = data.subset("train", "all" if view == "full" else view).ids.tolist()
    seen = collected(data.train_dataloader())
    assert sorted(seen) == expected
    assert seen != expected


def test_statistics_shows_everything_once_in_id_order_and_marks_the_forget_set() -> None:
    data = DigitWorld(strokes=20, batch_size=16, view="statistics", shots=3)
    split = data.request(ForgetRequest(classes=(2,)), ForgetRequest(classes=(5, 6)))
    batches = list(data.train_dataloader())
    ids = [id for batch in batches for id in batch["id"].tolist()]
    assert ids == sorted(split.ids["train/forget"] + split.ids["train/retain"])
    marked = [id for b in batches for id in b["id"][b["forget"]].tolist()]
    assert marked == list(split.ids["train/forget"])
    assert len(marked) == 6


def test_the_shorter_stream_of_a_pair_is_cycled_with_new_permutations() -> None:
    data = DigitWorld(strokes=20, variants=4, batch_size=6, view="paired")
    split = data.request(ForgetRequest(classes=(2,)))
    batches = [batch for batch, _, _ in data.train_dataloader()]
    retain = [id for batch in batches for id in batch["retain"]["id"].tolist()]
    assert sorted(retain) == list(split.ids["train/retain"])
    forget = [tuple(batch["forget"]["id"].tolist()) for batch in batches]
    assert len(forget) == 12
    passes = [forget[i] + forget[i + 1] for i in range(0, 12, 2)]
    assert all(sorted(one) == list(split.ids["train/forget"]) for one in passes)
    assert len(set(passes)) == 6


def test_evaluation_loaders_are_the_roles_that_have_samples() -> None:
    data = DigitWorld(strokes=20, batch_size=16)
    assert data.eval_names("test") == ("all",)
    assert collected(data.test_dataloader()[0]) == data.dataset("test").ids.tolist()
    data.request(ForgetRequest(classes=(2,)))
    assert data.eval_names("test") == ("forget", "retain")
    split = data.request(ForgetRequest(classes=(2,)), ForgetRequest(classes=(3,)))
    assert data.eval_names("val") == ("forget", "retain", "previous")
    for stage, loaders in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        for name, loader in zip(data.eval_names(stage), loaders, strict=True):
            assert collected(loader) == list(split.ids[f"{stage}/{name}"])
    sample = int(data.dataset("train").ids[0])
    data.request(ForgetRequest(samples=(sample,)))
    assert data.eval_names("test") == ("retain",)


def test_unknown_view_role_and_stage_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'paired'"):
        DigitWorld(view="pared")
    data = DigitWorld(strokes=10)
    with pytest.raises(ConfigurationError, match="did you mean 'retain'"):
        data.subset("train", "retian")
    with pytest.raises(DataError, match="did you mean 'train'"):
        data.dataset("trian")
    with pytest.raises(ConfigurationError, match="needs a request"):
        data.subset("train", "forget")
    data.view = "paired"
    with pytest.raises(ConfigurationError, match="needs a request"):
        data.train_dataloader()


def test_a_refused_request_leaves_the_earlier_split_in_place() -> None:
    data = DigitWorld(strokes=20)
    split = data.request(ForgetRequest(classes=(2,)))
    with pytest.raises(RequestError, match="did you mean 'seven'"):
        data.request(ForgetRequest(classes=("sevn",)))
    assert data.split == split
    assert len(data.subset("train", "forget", whole=True)) == 16


def test_whole_and_unlimited_ignore_the_limits() -> None:
    data = DigitWorld(strokes=20, shots=3, missing_classes=("zero",))
    data.request(ForgetRequest(classes=(1,)), ForgetRequest(classes=(2,)))
    assert len(data.subset("train", "retain")) == 21
    assert len(data.subset("train", "missing")) == 0
    assert len(data.subset("train", "forget", whole=True)) == 16
    assert len(data.subset("train", "retain", whole=True)) == 8 * 16
    assert len(data.subset("train", "missing", whole=True)) == 16
    assert len(data.subset("test", "missing")) == 4
    free = data.unlimited()
    assert len(free.subset("train", "retain")) == 8 * 16
    assert len(data.subset("train", "retain")) == 21
    assert free.dataset("train") is data.dataset("train")


def test_data_without_labels_has_batches_without_labels() -> None:
    data = NoiseData(labelled=False)
    data.request(ForgetRequest(samples=(101, 105)))
    assert data.subset("train", "forget").ids.tolist() == [101, 105]
    assert "label" not in next(iter(data.loader(data.subset("train", "retain"))))
    with pytest.raises(RequestError, match="has no labels"):
        data.request(ForgetRequest(classes=(1,)))


# ---- what a method may read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "allowed"),
    [
        (DataAccess(), {"forget", "retain", "retain whole"}),
        (DataAccess(forget_inputs=False), {"retain", "retain whole"}),
        (DataAccess(retain="none"), {"forget"}),
        (DataAccess(retain="statistics"), {"forget", "retain"}),
        (DataAccess(retain="fraction"), {"forget", "retain"}),
    ],
)
def test_roles_that_were_not_declared_are_refused(access: DataAccess, allowed: set[str]) -> None:
    data = DigitWorld(strokes=20)
    data.request(ForgetRequest(classes=(1,)), ForgetRequest(classes=(2,)))
    restricted = data.restricted(access)
    for stage in ("train", "val", "test"):
        for role in ("all", "forget", "retain", "previous", "missing"):
            if role in allowed and stage != "test":
                assert len(restricted.subset(stage, role))
            else:
                with pytest.raises(AccessError):
                    restricted.subset(stage, role)
    if "retain whole" in allowed:
        assert len(restricted.subset("train", "retain", whole=True))
    else:
        with pytest.raises(AccessError):
            restricted.subset("train", "retain", whole=True)
    for stage in ("train", "val", "test"):
        with pytest.raises(AccessError):
            restricted.dataset(stage)
    with pytest.raises(AccessError):
        restricted.test_dataloader()
    assert restricted.eval_names("val") == tuple(r for r in ("forget", "retain") if r in allowed)
    assert data.access is None
    assert len(data.dataset("test"))


@pytest.mark.parametrize(
    ("view", "access"),
    [
        ("full", DataAccess()),
        ("forget", DataAccess(forget_inputs=False)),
        ("retain", DataAccess(retain="none")),
        ("paired", DataAccess(retain="none")),
        ("statistics", DataAccess(forget_inputs=False)),
        ("statistics", DataAccess(retain="none")),
    ],
)
def test_views_that_need_more_than_was_declared_are_refused(view: View, access: DataAccess) -> None:
    data = DigitWorld(strokes=20, view=view)
    data.request(ForgetRequest(classes=(1,)))
    with pytest.raises(AccessError):
        data.restricted(access).train_dataloader()
    data.train_dataloader()


@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("retain", [True, False])
def test_labels_that_were_not_declared_are_absent(forget: bool, retain: bool) -> None:
    data = DigitWorld(strokes=20, view="paired")
    data.request(ForgetRequest(classes=(1,)))
    restricted = data.restricted(DataAccess(forget_labels=forget, retain_labels=retain))
    batch = next(iter(restricted.train_dataloader()))[0]
    assert ("label" in batch["forget"]) == forget
    assert ("label" in batch["retain"]) == retain
    assert (restricted.subset("val", "forget").labels is not None) == forget
    restricted.view = "statistics"
    assert ("label" in next(iter(restricted.train_dataloader()))) == (forget and retain)
    names = restricted.eval_names("val")
    for name, loader in zip(names, restricted.val_dataloader(), strict=True):
        assert ("label" in next(iter(loader))) == {"forget": forget, "retain": retain}[name]


# ---- under a trainer ----------------------------------------------------------------------------


# loader workers ask for batches as soon as they start, even before Lightning sets the epoch
@pytest.mark.parametrize(("view", "num_workers"), [("paired", 0), ("retain", 1)])
def test_a_resumed_run_sees_the_samples_of_an_unbroken_one(
    quiet_trainer: Callable[..., Trainer], tmp_path: Path, view: View, num_workers: int
) -> None:
    def data() -> DigitWorld:
        module = DigitWorld(
            strokes=20, variants=2, batch_size=8, view=view, num_workers=num_workers
        )
        module.request(ForgetRequest(classes=(2,)))
        return module

    unbroken = Recorder()
    quiet_trainer(max_epochs=4).fit(unbroken, datamodule=data())
    assert len({str(epoch) for epoch in unbroken.seen}) == 4
    killed, resumed = Recorder(), Recorder()
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(killed, datamodule=data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    quiet_trainer(max_epochs=4).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    assert killed.seen + resumed.seen == unbroken.seen


def test_two_processes_see_the_samples_of_one(
    quiet_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def data() -> DigitWorld:
        module = DigitWorld(strokes=20, variants=2, batch_size=7, view="paired")
        module.request(ForgetRequest(classes=(2,)))
        return module

    single = Recorder()
    quiet_trainer(max_epochs=2).fit(single, datamodule=data())
    path = tmp_path / "seen"
    quiet_trainer(max_epochs=2, devices=2, strategy="ddp_fork").fit(
        Recorder(path), datamodule=data()
    )
    ranks = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(2)]
    for epoch, expected in enumerate(single.seen):
        together = [a + b for a, b in zip(ranks[0][epoch], ranks[1][epoch], strict=True)]
        assert [sorted(batch) for batch in together] == [sorted(batch) for batch in expected]
