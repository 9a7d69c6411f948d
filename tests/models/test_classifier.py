"""The classifier as a model: its outputs, its parts, its recipe."""

from __future__ import annotations

import copy
import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mmforget.errors import (
    AccessError,
    ConfigurationError,
    MissingFileError,
    ModelError,
)
from mmforget.models.base import (
    HasFeatures,
    HasHead,
    HasLogits,
    HasLoss,
    Model,
    Sites,
    check_capabilities,
    state_hash,
)
from mmforget.models.classifier import ImageClassifier

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


class Net(nn.Module):
    """A small convolutional network."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=4)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def tiny_vit(**settings: Any) -> ImageClassifier:
    settings = {"num_classes": 5, "network_args": TINY} | settings
    return ImageClassifier("vit_tiny_patch16_224", **settings)


BUILDERS: dict[str, Callable[[], ImageClassifier]] = {
    "timm ViT": tiny_vit,
    "timm distilled DeiT": functools.partial(
        ImageClassifier, "deit_tiny_distilled_patch16_224", 5, network_args=TINY
    ),
    "timm LeViT": functools.partial(
        ImageClassifier, "levit_128s", 5, network_args={"img_size": 32}
    ),
    "timm ResNet": functools.partial(ImageClassifier, "test_resnet", 5),
    "timm EfficientNet": functools.partial(ImageClassifier, "test_efficientnet", 5),
    "timm ConvNeXt": functools.partial(ImageClassifier, "test_convnext", 5),
    "torchvision ShuffleNet": functools.partial(
        ImageClassifier, "shufflenet_v2_x0_5", 5, "torchvision"
    ),
    "torchvision MobileNet": functools.partial(
        ImageClassifier, "mobilenet_v3_small", 5, "torchvision"
    ),
    "transformers ViT": functools.partial(
        ImageClassifier, "vit", 5, "transformers", network_args=HF_TINY
    ),
    "transformers DINOv2": functools.partial(
        ImageClassifier, "dinov2", 5, "transformers", network_args=HF_TINY
    ),
    "own class": functools.partial(ImageClassifier, Net, 5),
}
every_kind = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(4, 3, 32, 32, generator=generator),
        "label": torch.tensor([0, 1, 4, 1]),
        "id": torch.arange(4),
        "weight": torch.tensor([1.0, 1.0, 1.0, 0.0]),
    }


# ---- outputs --------------------------------------------------------------------------------


@every_kind
def test_logits_from_features_are_the_output_of_the_network(
    build: Callable[[], ImageClassifier], batch: dict[str, Tensor]
) -> None:
    model = build().eval()
    check_capabilities("test", model, (HasLoss, HasLogits, HasFeatures, HasHead, Sites))
    with torch.no_grad():
        plain = model.network((batch["image"] - model.mean) / model.std)
        plain = plain if isinstance(plain, Tensor) else plain.logits
        features = model.features(batch)
        assert features.shape == (4, model.num_features)
        assert torch.equal(model.logits(batch), plain)
        assert torch.equal(model.logits(batch, features), plain)
        expected = -plain.log_softmax(1)[torch.arange(4), batch["label"]]
        assert model.loss(batch, features) == pytest.approx(expected)
        assert torch.equal(model.loss(batch), model.loss(batch, features))
    assert model.num_classes == plain.shape[1] == 5


@every_kind
def test_per_sample_gradients(
    build: Callable[[], ImageClassifier], batch: dict[str, Tensor]
) -> None:
    """`torch.func` works on the whole model, and no hook survives."""
    model = build().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        scores = functional_call(model, weights, (image[None],))
        return nn.functional.cross_entropy(scores, label[None])

    single = vmap(grad(loss), (None, 0, 0))(parameters, batch["image"], batch["label"])
    model.loss(batch).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close = torch.allclose(single[name].mean(0), parameter.grad, rtol=1e-4, atol=1e-6)
            assert close, name
    model.features(batch)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_normalisation() -> None:
    model = tiny_vit(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0)).eval()
    image = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack(
        [(image[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 1.0)])], 1
    )
    assert torch.allclose(model(image), model.network(by_hand), atol=1e-6)
    assert "mean" in model.state_dict()
    assert ImageClassifier("test_resnet", 5).mean.flatten().tolist() == pytest.approx([0.5] * 3)
    imagenet = timm.create_model("resnet18").pretrained_cfg["mean"]
    assert ImageClassifier("resnet18", 5).mean.flatten().tolist() == pytest.approx(imagenet)
    with pytest.raises(ModelError, match="every value must be positive"):
        tiny_vit(std=(0.5, 0.0, 0.5))


Named = namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda scores: (scores, None),
        lambda scores: [scores],
        lambda scores: {"logits": scores},
        lambda scores: Named(scores, None),
        lambda scores: transformers.modeling_outputs.ImageClassifierOutput(logits=scores),
    ],
    ids=["tuple", "list", "dict", "named tuple", "ModelOutput"],
)
def test_other_kinds_of_output(wrap: Callable[[Tensor], Any], batch: dict[str, Tensor]) -> None:
    class Wrapped(Net):
        def forward(self, images: Tensor) -> Any:
            return wrap(super().forward(images))

    model = ImageClassifier(Wrapped()).eval()
    scores = model.logits(batch)
    assert scores.shape == (4, 5)
    assert torch.equal(model.logits(batch, model.features(batch)), scores)


def test_an_output_without_logits(batch: dict[str, Tensor]) -> None:
    class Odd(Net):
        def forward(self, images: Tensor) -> Any:
            return {"scores": super().forward(images)}

    with pytest.raises(ModelError, match=r"returned a dict; it must return \(B, C\) logits"):
        ImageClassifier(Odd()).logits(batch)


def test_no_labels(batch: dict[str, Tensor]) -> None:
    del batch["label"]
    model = ImageClassifier(Net())
    assert model.logits(batch).shape == (4, 5)
    with pytest.raises(AccessError, match="needs labels"):
        model.loss(batch)


# ---- the head -------------------------------------------------------------------------------


def test_heads_by_name() -> None:
    found = {name: build().head_names for name, build in BUILDERS.items()}
    assert found["timm ViT"] == ("head",)
    assert found["timm distilled DeiT"] == found["timm LeViT"] == ("head", "head_dist")
    assert found["timm EfficientNet"] == found["transformers ViT"] == ("classifier",)
    assert found["torchvision ShuffleNet"] == found["own class"] == ("fc",)
    assert found["torchvision MobileNet"] == ("classifier.3",)
    model = BUILDERS["timm distilled DeiT"]()
    assert {id(p) for p in model.head.parameters()} == {
        id(p) for name, p in model.named_parameters() if "head" in name
    }


class TwoCrops(Net):
    def forward(self, images: Tensor) -> Tensor:
        return (super().forward(images) + super().forward(images.flip(3))) / 2


class Unused(Net):
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images).relu().mean((2, 3))
        return nn.functional.linear(hidden, self.fc.weight, self.fc.bias)


class Unpooled(Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).flatten(2).transpose(1, 2)).mean(1)


class Scaled(Net):
    def forward(self, images: Tensor) -> Tensor:
        return 10 * super().forward(images)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TwoCrops, "'fc' was called 2 times"),
        (Unused, "'fc' was called 0 times"),
        (Unpooled, r"input of shape \(4, 64, 8\) instead of \(B, d\)"),
        (Scaled, "Scaled does not return what its head 'fc' gives"),
    ],
)
def test_features_that_do_not_exist(
    kind: type[Net], message: str, batch: dict[str, Tensor]
) -> None:
    model = ImageClassifier(kind())
    assert model.loss(batch).shape == (4,)
    with pytest.raises(ModelError, match=message):
        model.features(batch)
    assert not model.network.fc._forward_hooks


def test_a_head_that_is_no_linear_layer(batch: dict[str, Tensor]) -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, features: Tensor) -> Tensor:
            return nn.functional.linear(
                nn.functional.normalize(features), nn.functional.normalize(self.weight)
            )

    network = Net()
    network.fc = Cosine()
    with pytest.raises(ModelError, match="no linear layer with 5 outputs"):
        ImageClassifier(network, 5)
    model = ImageClassifier(network, 5, head="fc")
    assert model.num_features == 8
    assert torch.equal(model.logits(batch, model.features(batch)), model.logits(batch))
    with pytest.raises(ModelError, match="no layer `head` 'fcc'"):
        ImageClassifier(network, head="fcc")


def test_the_number_of_classes_must_fit() -> None:
    assert ImageClassifier(Net(classes=7)).num_classes == 7
    with pytest.raises(ModelError, match="no linear layer with 6 outputs"):
        ImageClassifier(Net(), 6)
    with pytest.raises(ModelError, match=r"has 5 outputs, but `num_classes` is 6"):
        ImageClassifier(Net(), 6, head="fc")
    with pytest.raises(ModelError, match="at least 2"):
        tiny_vit(num_classes=1)
    with pytest.raises(ModelError, match="2 names for 5 classes"):
        tiny_vit(class_names=("a", "b"))


@pytest.mark.slow  # the first import of the compiler
def test_a_compiled_network_is_unwrapped() -> None:
    model = ImageClassifier(torch.compile(Net()))
    assert isinstance(model.network, Net)
    assert [site.name for site in model.sites("all")] == ["conv"]


# ---- building -------------------------------------------------------------------------------


@every_kind
def test_fresh_draws_new_weights(build: Callable[[], ImageClassifier]) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # nothing of this may be inherited
    before, state = state_hash(model), torch.random.get_rng_state()
    first, again, other = model.fresh(1), model.fresh(1), model.fresh(2)
    assert state_hash(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert state_hash(first) == state_hash(again) != state_hash(other)
    assert type(first) is ImageClassifier and first.training
    assert torch.equal(first.mean, model.mean)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in first.named_parameters()} == shapes
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in first.parameters()}
    for name, parameter in first.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, model.get_parameter(name))


def test_fresh_keeps_the_recipe_and_leaves_the_trainer(
    quiet_trainer: Callable[..., Trainer],
) -> None:
    model = tiny_vit(lr=0.125, class_names=tuple("abcde"))
    model.trainer = quiet_trainer()
    new = model.fresh(0)
    assert new.lr == 0.125 and new.class_names == tuple("abcde")
    assert new._trainer is None and model._trainer is not None


def test_fresh_needs_to_know_how(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match=r"Net was given as an object.*library='custom'"):
        ImageClassifier(Net()).fresh(0)
    shared = Net()
    with pytest.raises(ModelError, match="returned the same weights twice"):
        ImageClassifier(lambda: shared).fresh(0)


def test_objects_of_timm_and_transformers_are_recognised(batch: dict[str, Tensor]) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    assert state_hash(ImageClassifier(network).fresh(3)) == state_hash(tiny_vit().fresh(3))
    config = transformers.AutoConfig.for_model("vit", num_labels=5, **HF_TINY)
    network = transformers.ViTForImageClassification(config)
    expected = state_hash(BUILDERS["transformers ViT"]().fresh(3))
    assert state_hash(ImageClassifier(network).fresh(3)) == expected
    changed = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    changed.blocks[1].mlp.fc1 = nn.Linear(32, 64)
    changed.blocks[1].mlp.fc2 = nn.Linear(64, 32)
    with pytest.raises(ModelError, match="was given as an object"):
        ImageClassifier(changed).fresh(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "vit_tinny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"network": "resnet19", "library": "torchvision"}, "no classifier 'resnet19', did you"),
        ({"network": "fcn_resnet50", "library": "torchvision"}, "no classifier 'fcn_resnet50'"),
        ({"network": "vitt", "library": "transformers"}, "no model type 'vitt', did you mean"),
        ({"network": "bert", "library": "transformers"}, "no image classifier of type 'bert'"),
        ({"network": "no.Such", "library": "custom"}, "'no.Such' cannot be imported"),
        ({"network": "Net", "library": "custom"}, "'Net' is not the import path"),
        ({"network": "os.mkdir", "library": "custom"}, "'os.mkdir' is not the import path"),
        ({"network": "resnet18", "library": "keras"}, "unknown `library` 'keras'"),
        ({"network_args": {"depht": 2}}, "`network_args` {'depht': 2}.*depht"),
        ({"network_args": {"embed_dim": 30, "num_heads": 4}}, "timm cannot build"),
        ({"network": "test_resnet.none", "pretrained": True}, "no pretrained weights"),
        ({"network": Net, "pretrained": True}, "go with a network given by its name"),
        ({"network": lambda: "text"}, "returned a str"),
    ],
)
def test_networks_that_cannot_be_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ImageClassifier(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"network": "resnet18", "pretrained": True},
        {"network": "some/model", "library": "transformers", "pretrained": True},
        {"network": "some/model", "library": "transformers"},
    ],
)
def test_downloads_that_fail(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match="check the name and the connection"):
        ImageClassifier(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0.0}, "`lr`"), ({"weight_decay": -1.0}, "`weight_decay`"), ({"warmup": 1.0}, "warm")],
)
def test_recipe_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_vit(**settings)


@pytest.mark.parametrize("form", ["names", "class path", "import path"])
def test_yaml(form: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor takes plain types, and networks of the user by class path."""
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Sequential):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, 5))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    init_args: dict[str, Any] = {"class_names": list("abcde"), "mean": [0.0, 0.0, 0.0], "lr": 0.5}
    if form == "names":
        init_args |= {"network": "vit_tiny_patch16_224", "network_args": TINY, "num_classes": 5}
    elif form == "class path":
        init_args["network"] = {"class_path": "own_networks.Own", "init_args": {"width": 6}}
    else:
        init_args |= {"network": "own_networks.Own", "library": "custom"}
        init_args["network_args"] = {"width": 6}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=Model)
    given = {"class_path": "mmforget.models.classifier.ImageClassifier", "init_args": init_args}
    model = parser.instantiate(parser.parse_object({"model": given})).model
    assert isinstance(model, ImageClassifier)
    assert model.class_names == tuple("abcde") and model.lr == 0.5
    assert model.num_features == (32 if form == "names" else 6)
    assert model.fresh(0).num_features == model.num_features


# ---- training -------------------------------------------------------------------------------


class Loaders:
    """Makes loaders of ready batches; `Trainer` takes any iterable."""

    def __init__(self, *batches: dict[str, Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_training_lowers_the_loss_and_counts_every_sample(
    batch: dict[str, Tensor], quiet_trainer: Callable[..., Trainer]
) -> None:
    model = tiny_vit(lr=1e-2, weight_decay=0.0).fresh(0)
    start = model.loss(batch)[:3].mean().item()
    trainer = quiet_trainer(max_epochs=10)
    other = copy.deepcopy(batch)
    other["label"] = torch.tensor([0, 0, 0, 0])
    trainer.fit(model, Loaders(batch, batch), [Loaders(batch), Loaders(other, batch)])
    assert model.eval().loss(batch)[:3].mean().item() < start / 5
    # padding (the last sample) does not count: 3 of 3, and 1 + 3 of 6
    assert trainer.logged_metrics["val/accuracy/0"] == pytest.approx(1.0)
    assert trainer.logged_metrics["val/accuracy/1"] == pytest.approx(4 / 6)
    result = trainer.test(model, Loaders(batch), verbose=False)
    assert result[0]["test/accuracy"] == pytest.approx(1.0)
    [predicted] = trainer.predict(model, Loaders(batch))
    assert predicted["id"].tolist() == [0, 1, 2]
    assert predicted["prediction"].tolist() == [0, 1, 4]
    assert predicted["probability"].sum(1) == pytest.approx(torch.ones(3))


class Sliced(Loaders):
    """Gives each process its part of the batch."""

    def __iter__(self) -> Any:
        rank, world = 0, 1
        if torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for batch in self.batches:
            yield {name: value[rank::world] for name, value in batch.items()}


def test_two_processes_equal_one(
    batch: dict[str, Tensor], quiet_trainer: Callable[..., Trainer]
) -> None:
    """Also where padding leaves one process with fewer samples."""
    single, double = tiny_vit().fresh(0), tiny_vit().fresh(0)
    data = Sliced(batch, batch, batch)
    one = quiet_trainer(use_distributed_sampler=False)
    one.fit(single, data, data)
    two = quiet_trainer(strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    two.fit(double, data, data)
    assert torch.allclose(single.eval()(batch["image"]), double.eval()(batch["image"]), atol=1e-5)
    accuracy = one.callback_metrics["val/accuracy"]
    assert two.callback_metrics["val/accuracy"] == pytest.approx(accuracy)


def test_padding_does_not_train(
    batch: dict[str, Tensor], quiet_trainer: Callable[..., Trainer]
) -> None:
    trained = []
    for length in (3, 4):
        model = tiny_vit().fresh(0)
        part = {name: value[:length] for name, value in batch.items()}
        quiet_trainer(max_epochs=3).fit(model, Loaders(part))
        trained.append(model.eval()(batch["image"]))
    assert torch.allclose(*trained, atol=1e-5)


def test_names_of_the_loaders(tiny_data: Any, quiet_trainer: Callable[..., Trainer]) -> None:
    trainer = quiet_trainer(limit_train_batches=2)
    trainer.fit(tiny_vit(num_classes=10), tiny_data)
    assert {"val/accuracy/forget", "val/accuracy/retain", "train/loss"} <= set(
        trainer.logged_metrics
    )


def test_schedule() -> None:
    model = tiny_vit(lr=1.0, warmup=0.2)
    optimizer, scheduler = model.optimizers_for(10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model.network.blocks[0].mlp.fc1.weight)] == 0.05
    assert decays[id(model.network.blocks[0].mlp.fc1.bias)] == 0.0
    assert len(decays) == len(list(model.parameters()))


def test_the_schedule_follows_the_trainer(
    batch: dict[str, Tensor], quiet_trainer: Callable[..., Trainer]
) -> None:
    model = tiny_vit(lr=1e-3)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(model, Loaders(batch, batch, batch))
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ConfigurationError, match="set `max_epochs` or `max_steps`"):
        quiet_trainer(max_epochs=-1).fit(tiny_vit(), Loaders(batch))


def test_resuming_from_a_checkpoint(
    batch: dict[str, Tensor], quiet_trainer: Callable[..., Trainer], tmp_path: Any
) -> None:
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    straight = tiny_vit(weight_decay=0.125).fresh(0)
    trainer = quiet_trainer(max_epochs=4, enable_checkpointing=True, callbacks=[every])
    trainer.fit(straight, Loaders(batch, batch))
    resumed = tiny_vit(weight_decay=0.125).fresh(7)
    half = tmp_path / "epoch=1.ckpt"
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(resumed, Loaders(batch, batch), ckpt_path=half, weights_only=True)
    assert trainer.global_step == 8
    assert state_hash(resumed) == state_hash(straight)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert state_hash(loaded) == state_hash(straight)
    assert loaded.weight_decay == 0.125


def test_networks_are_not_written_into_hyperparameters() -> None:
    assert "network" not in ImageClassifier(Net()).hparams
    assert "network" not in ImageClassifier(Net).hparams
    assert tiny_vit().hparams["network"] == "vit_tiny_patch16_224"
