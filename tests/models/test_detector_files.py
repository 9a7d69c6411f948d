"""Native folders of detectors: written, read, and read by programs without mmforget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmforget.errors import MissingFileError, ModelError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.detector import Detector, load_detector
from mmforget.models.detector_files import read
from mmforget.testing.tiny_detectors import query_settings, tiny_detector, tiny_scenes

QUERIES = ("detr", "conditional_detr", "deformable_detr", "rt_detr")
BUILDER = "fasterrcnn_mobilenet_v3_large_320_fpn"
SMALL = {"min_size": 64, "max_size": 96}


def built(name: str = BUILDER, **settings: Any) -> Detector:
    return Detector(name, 4, "torchvision", network_args=SMALL | settings)


@pytest.mark.parametrize("kind", [*QUERIES, "builder"])
@torch.no_grad()
def test_native_folders(kind: Any, tmp_path: Path) -> None:
    batch = tiny_scenes()
    batch["label"] = batch["label"].clamp(max=3)
    if kind == "builder":
        model = built(box_score_thresh=0.0)
        model.class_names = ("a", "b", "c", "d")
    else:
        settings = query_settings(kind)
        model = Detector(
            kind, 4, network_args=settings, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
            class_names=("a", "b", "c", "d"),
        )  # fmt: skip
    model.eval().save_native(tmp_path)
    loaded = load_detector(tmp_path)
    assert not loaded.training
    assert loaded.class_names == ("a", "b", "c", "d") and loaded.num_classes == 4
    assert state_hash(loaded) == state_hash(model)
    assert torch.equal(loaded.loss(batch), model.loss(batch))
    for a, b in zip(loaded.detect(batch), model.detect(batch), strict=True):
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.labels, b.labels)
    state = torch.get_rng_state()
    again = loaded.fresh(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.num_classes == 4 and again.training and again.kind.network is again.network
    assert state_hash(again) != state_hash(loaded)
    file = Detector(
        model.hparams["network"],
        4,
        "torchvision" if kind == "builder" else "transformers",
        weights=tmp_path / "model.safetensors",
        network_args=model.hparams["network_args"],
        mean=model.mean.tolist(),
        std=model.std.tolist(),
    )
    assert state_hash(file) == state_hash(model)


def test_a_folder_of_an_object_needs_the_object(tmp_path: Path) -> None:
    model = tiny_detector("retinanet", seed=3)
    model.save_native(tmp_path)
    with pytest.raises(ModelError, match="given as an object"):
        load_detector(tmp_path)
    loaded = load_detector(tmp_path, network=tiny_detector("retinanet", seed=4).network)
    assert state_hash(loaded) == state_hash(model)


def test_frozen_batch_normalisation_stays_frozen(tmp_path: Path) -> None:
    from torchvision.models.detection.faster_rcnn import fasterrcnn_mobilenet_v3_large_320_fpn
    from torchvision.ops import FrozenBatchNorm2d

    model, batch = built(), tiny_scenes()
    batch["label"] = batch["label"].clamp(max=3)
    frozen: Any = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, **SMALL
    )
    for module in list(frozen.backbone.modules()):  # as torchvision builds a trained one
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = FrozenBatchNorm2d(child.num_features, eps=0.125)
                norm.running_var.uniform_(0.5, 2.0)
                setattr(module, name, norm)
    model.network = frozen
    model.eval().save_native(tmp_path)
    loaded = load_detector(tmp_path)
    assert state_hash(loaded) == state_hash(model)
    assert torch.equal(loaded.loss(batch), model.loss(batch))
    kept = [type(m) for m in loaded.network.backbone.modules() if "BatchNorm" in type(m).__name__]
    assert set(kept) == {FrozenBatchNorm2d}


RELOAD = """
import json, os, sys
sys.modules["mmforget"] = None  # any import of it fails
import torch, torchvision, transformers
from safetensors.torch import load_file
folder = sys.argv[1]
given, out = load_file(folder + "/given.safetensors"), {}
for name in sorted(os.listdir(folder)):
    if not os.path.isdir(folder + "/" + name):
        continue
    config = json.load(open(folder + "/" + name + "/config.json"))
    with torch.no_grad():
        if config.get("library") == "torchvision":
            network = torchvision.models.get_model(
                config["name"], num_classes=config["num_classes"] + 1, **config["network_args"])
            network.load_state_dict(load_file(folder + "/" + name + "/model.safetensors"))
            found = network.eval()([given["images"][0]])[0]
            out[name] = torch.cat([found["boxes"], found["scores"][:, None]], 1)
        else:
            network = transformers.AutoModelForObjectDetection.from_pretrained(folder + "/" + name)
            processor = transformers.AutoImageProcessor.from_pretrained(folder + "/" + name)
            pixels = [image.permute(1, 2, 0).numpy() for image in (given["images"] * 255).byte()]
            found = network.eval()(**processor(images=pixels, return_tensors="pt"))
            out[name] = torch.cat([found.logits, found.pred_boxes], 2)
torch.save(out, folder + "/out.pt")
"""


@pytest.mark.slow  # a new interpreter imports two libraries, and the backbones are full-sized
@torch.no_grad()
def test_other_programs_load_the_folders(tmp_path: Path) -> None:
    images = (tiny_scenes()["image"][[0, 2]] * 255).byte() / 255
    full = {"image": images, "extent": torch.tensor([[64, 80]] * 2)}
    expected = {}
    names = {
        BUILDER: {"box_score_thresh": 0.0},
        "retinanet_resnet50_fpn": {"score_thresh": 0.0},
        "fcos_resnet50_fpn": {"score_thresh": 0.0},
    }
    for name, settings in names.items():
        model = built(name, **settings).eval()
        (tmp_path / name).mkdir()
        model.save_native(tmp_path / name)
        found = model.network([images[0]])[0]  # with class 0
        expected[name] = torch.cat([found["boxes"], found["scores"][:, None]], 1)
        assert len(expected[name]) > 0
        assert state_hash(load_detector(tmp_path / name)) == state_hash(model)
    for kind in QUERIES:
        model = tiny_detector(kind).eval()
        (tmp_path / kind).mkdir()
        model.save_native(tmp_path / kind)
        output: Any = model.network(**model.kind._inputs(full["image"], full["extent"]))
        expected[kind] = torch.cat([output.logits, output.pred_boxes], 2)
    save_file({"images": images}, tmp_path / "given.safetensors")
    command = [sys.executable, "-I", "-c", RELOAD, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(found) == set(expected) == {*names, *QUERIES}
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-4), name


# ---- bad input ----------------------------------------------------------------------------------


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no"):
        load_detector(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        load_detector(tmp_path)
    model = tiny_detector("rt_detr")
    model.save_native(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    with pytest.raises(ModelError, match="holds weights only"):
        load_detector(weights)
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError):
        load_detector(tmp_path)
    save_file(load_file(_written(weights, data)) | {"extra": torch.ones(1)}, weights)
    with pytest.raises(WeightsError, match="does not fit"):
        load_detector(tmp_path)
    weights.unlink()
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        load_detector(tmp_path)
    config.write_text(text[:20])
    with pytest.raises(WeightsError, match="damaged"):
        load_detector(tmp_path)
    for other in ({"model_type": "bert"}, {}, [1]):
        config.write_text(json.dumps(other))
        with pytest.raises(WeightsError, match="holds no detector"):
            read(tmp_path)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class Trap:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["detr", "fcos"])
def test_pickles_are_refused(kind: Any, tmp_path: Path) -> None:
    model, path = tiny_detector(kind, seed=1), tmp_path / "weights.pt"
    torch.save({"a": Trap(tmp_path / "trace")}, path)
    with pytest.raises(WeightsError, match="would execute code"):
        load_detector(path, network=tiny_detector(kind).network)
    assert not (tmp_path / "trace").exists()
    torch.save(model.network.state_dict(), path)  # tensors only: no code
    loaded = load_detector(path, network=tiny_detector(kind).network)
    assert state_hash(loaded) == state_hash(model)
