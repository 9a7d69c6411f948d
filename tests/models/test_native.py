"""Saved folders belong to the library that owns the network, and load with and without mmforget."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from mmforget.errors import MissingFileError, ModelError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.classifier import ImageClassifier, load_classifier

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
RECIPE = {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.25, 0.125), "class_names": tuple("abcde")}


class Net(nn.Module):
    """A network of a user, with tied weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.second = nn.Conv2d(3, 3, 1, bias=False)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.second(self.first(images).relu()).mean((2, 3)))


BUILDERS: dict[str, Callable[[], ImageClassifier]] = {
    "timm": functools.partial(
        ImageClassifier, "vit_tiny_patch16_224", 5, network_args=TINY, **RECIPE
    ),
    "timm Swin": functools.partial(
        ImageClassifier,
        "swin_tiny_patch4_window7_224",
        5,
        network_args={
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": (1, 2),
            "num_heads": (1, 2),
        },
        **RECIPE,
    ),
    "torchvision": functools.partial(
        ImageClassifier,
        "mobilenet_v3_small",
        5,
        "torchvision",
        network_args={"reduced_tail": True},
        **RECIPE,
    ),
    "transformers": functools.partial(
        ImageClassifier, "vit", 5, "transformers", network_args=HF_TINY, **RECIPE
    ),
    "transformers DeiT": functools.partial(
        ImageClassifier, "deit", 5, "transformers", network_args=HF_TINY, **RECIPE
    ),
    "custom": functools.partial(ImageClassifier, Net, 5, **RECIPE),
}


def trained(model: ImageClassifier) -> ImageClassifier:
    """With weights and batch statistics that no initialisation gives."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.train()(torch.rand(8, 3, 32, 32, generator=generator))
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_round_trip(build: Callable[[], ImageClassifier], images: Tensor, tmp_path: Path) -> None:
    model = trained(build())
    before = state_hash(model)
    model.save_native(tmp_path)
    assert state_hash(model) == before
    loaded = load_classifier(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(loaded.mean, model.mean) and torch.equal(loaded.std, model.std)
    assert loaded.class_names == tuple("abcde")
    second = tmp_path / "again"
    second.mkdir()
    loaded.save_native(second)
    assert torch.equal(load_classifier(second)(images), model(images))
    # the loaded model knows its architecture, also when the folder is gone
    (tmp_path / "config.json").unlink()
    assert state_hash(loaded.fresh(1)) == state_hash(model.fresh(1))


def test_layers_with_version_numbers(images: Tensor, tmp_path: Path) -> None:
    """MNASNet refuses a state dict without them, and safetensors does not keep them."""
    model = ImageClassifier("mnasnet0_5", 5, "torchvision").eval()
    model.save_native(tmp_path)
    assert torch.equal(load_classifier(tmp_path)(images), model(images))


def test_timm_loads_its_folder(images: Tensor, tmp_path: Path) -> None:
    model = trained(BUILDERS["timm"]())
    model.save_native(tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    normalise = torchvision.transforms.Normalize(
        network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    )
    assert torch.equal(network(normalise(images)), model(images))
    assert network.pretrained_cfg["label_names"] == list("abcde")


def test_transformers_loads_its_folder(images: Tensor, tmp_path: Path) -> None:
    model = trained(BUILDERS["transformers"]())
    model.save_native(tmp_path)
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = (images * 255).round().to(torch.uint8)
    given = processor(list(pixels), return_tensors="pt")
    assert torch.allclose(network(**given).logits, model(pixels / 255), atol=1e-5)
    assert network.config.id2label[4] == "e"


def test_torchvision_loads_its_folder(images: Tensor, tmp_path: Path) -> None:
    model = trained(BUILDERS["torchvision"]())
    model.save_native(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    network = torchvision.models.get_model(
        config["name"], num_classes=config["num_classes"], **config["network_args"]
    )
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    normalise = torchvision.transforms.Normalize(config["mean"], config["std"])
    assert torch.equal(network.eval()(normalise(images)), model(images))


def test_networks_of_the_user(images: Tensor, tmp_path: Path) -> None:
    """Tied weights survive; an object without recorded arguments must be given again."""
    model = ImageClassifier(Net()).eval()
    model.save_native(tmp_path)
    network = Net()
    load_model(network, tmp_path / "model.safetensors", strict=False)
    assert torch.equal(ImageClassifier(network).eval()(images), model(images))
    with pytest.raises(ModelError, match=r"was given as an object.*give it as `network`"):
        load_classifier(tmp_path)
    assert torch.equal(load_classifier(tmp_path, network=Net())(images), model(images))


def test_objects_of_a_library_are_saved_in_its_format(images: Tensor, tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    model = ImageClassifier(network, mean=(0.1, 0.1, 0.1)).eval()
    model.save_native(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again((images - model.mean) / model.std), model(images))
    assert load_classifier(tmp_path).mean.flatten().tolist() == pytest.approx([0.1] * 3)


def test_folders_that_mmforget_did_not_write(images: Tensor, tmp_path: Path) -> None:
    """What timm and transformers write by themselves."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY).eval()
    timm.models.save_for_hf(network, str(tmp_path / "timm"), safe_serialization=False)
    model = load_classifier(tmp_path / "timm")
    assert torch.equal(model(images), network(images * 2 - 1))
    assert model.class_names == ()
    config = transformers.ViTConfig(num_labels=5, **HF_TINY)
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "hf")
    processor = transformers.ViTImageProcessor(image_mean=[0.0] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(tmp_path / "hf")
    model = load_classifier(tmp_path / "hf")
    assert torch.allclose(model(images), network(images * 2).logits)
    assert model.class_names == ()


def test_a_file_with_its_network(images: Tensor, tmp_path: Path) -> None:
    model = trained(BUILDERS["timm"]())
    path = tmp_path / "vit.pt"
    torch.save(model.network.state_dict(), path)
    loaded = load_classifier(path, "vit_tiny_patch16_224", 5, network_args=TINY)
    assert torch.equal(loaded.network(images), model.network(images))
    with pytest.raises(ModelError, match="holds weights only; say by `network`"):
        load_classifier(path)
    with pytest.raises(WeightsError, match=r"'head.weight' has shape \(5, 32\).*\(6, 32\)"):
        load_classifier(path, "vit_tiny_patch16_224", 6, network_args=TINY)
    torch.save({"network": model.network}, path)
    with pytest.raises(WeightsError, match="would execute code"):
        load_classifier(path, "vit_tiny_patch16_224", 5, network_args=TINY)
    torch.save(model.network, path)
    loaded = load_classifier(path, "vit_tiny_patch16_224", 5, network_args=TINY, allow_pickle=True)
    assert torch.equal(loaded.network(images), model.network(images))


def test_transformers_weights_that_do_not_fit(tmp_path: Path) -> None:
    BUILDERS["transformers"]().save_native(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["extra"] = weights.pop("vit.layernorm.bias")
    save_file(weights, file)
    with pytest.raises(WeightsError, match=r"missing \(vit.layernorm.bias\).*unknown \(extra\)"):
        load_classifier(tmp_path)
    weights["vit.layernorm.bias"] = weights.pop("extra")
    save_file({**weights, "classifier.weight": torch.ones(6, 32)}, file)
    with pytest.raises(WeightsError, match=r"'classifier.weight' has shape \(6, 32\).*\(5, 32\)"):
        load_classifier(tmp_path)
    save_file({**weights, "classifier.bias": torch.full((5,), float("nan"))}, file)
    with pytest.raises(WeightsError, match=r"values in 'classifier.bias' that are not finite"):
        load_classifier(tmp_path)


def test_a_lightning_checkpoint_with_its_network(
    images: Tensor, tmp_path: Path, quiet_trainer: Callable[..., Any]
) -> None:
    model = trained(BUILDERS["timm"]())
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    loaded = load_classifier(tmp_path / "last.ckpt", "vit_tiny_patch16_224", 5, network_args=TINY)
    assert torch.equal(loaded.network(images), model.network(images))


@pytest.mark.parametrize(
    "name", ["nothing/here/at/all", "./nothing", "weights.safetensors", "a/b.pt"]
)
def test_missing_sources(name: str) -> None:
    with pytest.raises(MissingFileError, match="give a file, a folder, or a hub id"):
        load_classifier(name)


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match="nor a reachable hub id"):
        load_classifier("nobody/no-such-model")


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"has no config.json"):
        load_classifier(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="holds an adapter, not a full model"):
        load_classifier(tmp_path)
    config = tmp_path / "config.json"
    for text, message in [
        ("{", "is damaged"),
        ("[]", "no description of a model"),
        ("{}", "names neither `architecture`"),
        ('{"library": "torchvision"}', "lacks or misuses 'network_args'"),
    ]:
        config.write_text(text)
        with pytest.raises(WeightsError, match=message):
            load_classifier(tmp_path)
    config.write_text('{"architecture": "test_resnet", "num_classes": 5}')
    with pytest.raises(MissingFileError, match=r"has no model.safetensors"):
        load_classifier(tmp_path)
    save_file({"strange": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"names are missing \(conv1.0.weight.*unknown"):
        load_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="no intact safetensors file"):
        load_classifier(tmp_path)


def test_a_folder_cannot_call_anything(tmp_path: Path) -> None:
    """A configuration from elsewhere may name a network, but no other function."""
    target = tmp_path / "made"
    about = {
        "library": "custom",
        "class_path": "os.mkdir",
        "network_args": {"path": str(target)},
        "num_classes": None,
        "mean": [0.5],
        "std": [0.5],
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'os.mkdir' is not the import path of a torch.nn.Module"):
        load_classifier(tmp_path)
    assert not target.exists()


def test_arguments_that_are_no_json(tmp_path: Path) -> None:
    args = {"norm_layer": nn.BatchNorm2d}
    model = ImageClassifier("resnet18", 5, "torchvision", network_args=args)
    with pytest.raises(ModelError, match=r"norm_layer.*cannot be written as JSON"):
        model.save_native(tmp_path)


RELOAD = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmforget":
            raise ImportError("mmforget is blocked")
sys.meta_path.insert(0, Block())
import timm, torch, torchvision, transformers
from safetensors.torch import load_file
folder = sys.argv[1]
try:
    import mmforget
except ImportError:
    pass
else:
    raise SystemExit("mmforget could be imported")
given = load_file(folder + "/images.safetensors")["images"]
config = json.load(open(folder + "/torchvision/config.json"))
tv = torchvision.models.get_model(config["name"], num_classes=config["num_classes"],
                                  **config["network_args"])
tv.load_state_dict(load_file(folder + "/torchvision/model.safetensors"))
hf = transformers.AutoModelForImageClassification.from_pretrained(folder + "/transformers")
tm = timm.create_model("local-dir:" + folder + "/timm", pretrained=True)
with torch.no_grad():
    out = {"timm": tm.eval()(given), "torchvision": tv.eval()(given),
           "transformers": hf.eval()(given).logits}
torch.save(out, folder + "/out.pt")
"""


@pytest.mark.slow  # a new interpreter imports three libraries
def test_other_programs_load_the_folders(images: Tensor, tmp_path: Path) -> None:
    expected = {}
    for name in ("timm", "torchvision", "transformers"):
        model = trained(BUILDERS[name]())
        (tmp_path / name).mkdir()
        model.save_native(tmp_path / name)
        expected[name] = model(images).detach()
        normalised = (images - model.mean) / model.std
    save_file({"images": normalised}, tmp_path / "images.safetensors")
    command = [sys.executable, "-I", "-c", RELOAD, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
