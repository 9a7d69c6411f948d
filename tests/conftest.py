"""Fixtures that several test folders share: tiny real data and models, each after a fixed seed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from lightning.pytorch import Trainer

from mmforget import DigitWorld, ForgetRequest, ImageClassifier
from mmforget.testing import conformance

torch.set_num_threads(1)

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def quiet_trainer() -> Callable[..., Trainer]:
    """Makes a trainer that leaves nothing on the disk and prints nothing."""
    return partial(conformance.quiet_trainer, max_epochs=1, limit_val_batches=1.0)


@pytest.fixture
def tiny_data() -> DigitWorld:
    """60 strokes per stage, one drawing each; the class 3 is to be forgotten."""
    data = DigitWorld(strokes=60, variants=2, eval_variants=1, batch_size=16)
    data.request(ForgetRequest(classes=(3,)))
    return data


@pytest.fixture(scope="session")
def trained_tiny_model() -> ImageClassifier:
    """A small transformer that has learnt the 120 training images of `tiny_data` fairly well."""
    data = DigitWorld(strokes=60, variants=2, eval_variants=1, batch_size=16)
    model = ImageClassifier(
        "vit_tiny_patch16_224", num_classes=10, network_args=TINY, lr=5e-3
    ).fresh(0)
    optimizer, schedule = model.optimizers_for(320)
    dataset = data.dataset("train")
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(80):
        for rows in torch.randperm(len(dataset), generator=order).split(30):
            optimizer.zero_grad()
            model.loss(dataset[rows.tolist()]).mean().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.fixture
def tiny_model(trained_tiny_model: ImageClassifier) -> ImageClassifier:
    """A copy of `trained_tiny_model` that a test may change."""
    return copy.deepcopy(trained_tiny_model)
