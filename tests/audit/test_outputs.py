from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from mmforget.audit.outputs import collect, collect_all
from mmforget.data.digit_world import DigitWorld
from mmforget.errors import CapabilityError, DataError, ModelError
from mmforget.models.base import state_hash
from mmforget.models.classifier import ImageClassifier


def test_outputs_are_those_of_a_plain_forward_pass_by_id(
    tiny_model: ImageClassifier, tiny_data: DigitWorld
) -> None:
    dataset = tiny_data.dataset("test")
    found = collect(tiny_model, dataset, batch_size=17)
    order = np.argsort(dataset.ids)
    batch = dataset[order.tolist()]
    with torch.no_grad():
        expected = tiny_model(batch["image"])
    torch.testing.assert_close(found.logits, expected)
    assert torch.equal(found.id, batch["id"]) and torch.equal(found.label, batch["label"])
    assert found.features is not None
    torch.testing.assert_close(tiny_model.head(found.features), expected)


def test_order_and_batch_size_do_not_matter(
    tiny_model: ImageClassifier, tiny_data: DigitWorld
) -> None:
    dataset = tiny_data.dataset("test")
    order = np.random.default_rng(0).permutation(len(dataset))
    first = collect(tiny_model, dataset, 64)
    second = collect(tiny_model, dataset.subset(order), 7)
    assert torch.equal(first.id, second.id) and torch.equal(first.label, second.label)
    torch.testing.assert_close(first.logits, second.logits)


def test_the_model_is_left_as_it_was(tiny_model: ImageClassifier, tiny_data: DigitWorld) -> None:
    tiny_model.train()
    tiny_model.network.blocks[0].eval()  # type: ignore[union-attr, operator, index]
    before = state_hash(tiny_model)
    modes = {name: module.training for name, module in tiny_model.named_modules()}
    collect(tiny_model, tiny_data.dataset("val"))
    assert state_hash(tiny_model) == before
    assert {name: module.training for name, module in tiny_model.named_modules()} == modes


def test_outputs_are_full_precision_under_autocast(
    tiny_model: ImageClassifier, tiny_data: DigitWorld
) -> None:
    dataset = tiny_data.dataset("test")
    plain = collect(tiny_model, dataset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = collect(tiny_model, dataset)
    assert torch.equal(plain.logits, other.logits)


def test_images_are_decoded_once_for_all_models(
    tiny_model: ImageClassifier, tiny_data: DigitWorld
) -> None:
    class Counting(type(tiny_data.dataset("test"))):  # type: ignore[misc]
        reads = 0

        def images(self, positions: np.ndarray) -> Tensor:
            type(self).reads += len(positions)
            return super().images(positions)

    dataset = tiny_data.dataset("test").subset(np.arange(30))
    dataset.__class__ = Counting
    found = collect_all([tiny_model, tiny_model.fresh(1)], dataset, 8)
    assert Counting.reads == 30
    assert not torch.equal(found[0].logits, found[1].logits)


class Drifting(ImageClassifier):
    """Changes a buffer in every forward pass, like BatchNorm left in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        self.mean += 0.01
        return super().forward(images)

    def features(self, batch: Any) -> Tensor:
        self.mean += 0.01
        return super().features(batch)


def test_a_model_that_changes_itself_is_refused(tiny_data: DigitWorld) -> None:
    arguments = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 1}
    model = Drifting("vit_tiny_patch16_224", num_classes=10, network_args=arguments)
    with pytest.raises(ModelError, match="Drifting changed its weights"):
        collect(model, tiny_data.dataset("test"))


def test_unusable_input_is_refused_with_the_remedy(
    tiny_model: ImageClassifier, tiny_data: DigitWorld
) -> None:
    dataset = tiny_data.dataset("test")
    with pytest.raises(DataError, match="no labels"):
        collect(tiny_model, dataset.unlabelled())
    with pytest.raises(DataError, match="no samples"):
        collect(tiny_model, dataset.subset(np.array([], dtype=np.int64)))
    with pytest.raises(CapabilityError, match="HasLogits"):
        collect(tiny_model.network, dataset)  # type: ignore[arg-type]


def _worker(rank: int, model: ImageClassifier, data: DigitWorld, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = collect(model, data.dataset("test").subset(np.arange(33)), 8)
    torch.save((found.logits, found.features, found.label, found.id), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_what_one_has(
    tiny_model: ImageClassifier, tiny_data: DigitWorld, tmp_path: Path
) -> None:
    arguments = (tiny_model, tiny_data, str(tmp_path))
    mp.start_processes(_worker, args=arguments, nprocs=2, start_method="fork")
    expected = collect(tiny_model, tiny_data.dataset("test").subset(np.arange(33)), 8)
    for rank in range(2):
        logits, features, label, sample = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(logits, expected.logits)
        torch.testing.assert_close(features, expected.features)
        assert torch.equal(label, expected.label) and torch.equal(sample, expected.id)
