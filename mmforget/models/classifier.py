"""Image classifiers of timm, torchvision, transformers or of the user, as one Lightning module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from mmforget.errors import AccessError, MissingFileError, ModelError
from mmforget.models import native
from mmforget.models.base import Batch, Site, SiteKind
from mmforget.models.ffn_sites import find_sites
from mmforget.models.native import Architecture, Library, Saved
from mmforget.models.recipe import TrainedModel, check_recipe

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.pt)(?<!\.pth)(?<!\.ckpt)")
"""``owner/name``; what ends like a weights file is a file that does not exist."""


class ImageClassifier(TrainedModel):
    """A classification network with its normalisation, its training recipe and its parts by name.

    Offers `HasLoss`, `HasLogits`, `HasFeatures`, `HasHead` and `Sites`. Images are (B, 3, H, W)
    floats in [0, 1]; the model normalises them itself.

    ::

        model = ImageClassifier("vit_tiny_patch16_224", num_classes=10,
                                network_args={"img_size": 32, "patch_size": 8})
        Trainer(max_epochs=20).fit(model, datamodule)
        model.save_native(folder)   # timm.create_model("local-dir:…", pretrained=True) loads it

    Dropout right before the head acts on the features in timm networks while they are in training
    mode; in evaluation mode, and with timm's default rate of 0, there is no difference.

    Args:
        network: name of a network (timm, torchvision), model type such as ``vit``, hub id or
            folder (transformers), import path of a class (custom), a function that builds a
            network, or a network itself; `fresh` works for the latter only if it is timm's or
            transformers'.
        num_classes: number of classes; None takes what the network has.
        library: who knows `network`; ignored if that is a function or a network.
        pretrained: start from the library's weights (a download).
        weights: file of native weights, safetensors or a plain state dict.
        network_args: further arguments for the builder of the network (timm: ``img_size``,
            ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``; transformers: fields of the
            configuration; custom: arguments of the class).
        head: qualified name of the last layer where it cannot be found by itself.
        mean: mean of each channel, in [0, 1]; None takes that of the library's weights, and 0.5
            where the library has no opinion.
        std: standard deviation of each channel, positive; as `mean`.
        class_names: names of the outputs.
        lr: highest learning rate of AdamW.
        weight_decay: decoupled, for weights of at least two dimensions.
        warmup: share of the steps in [0, 1) over which the rate rises from 0 to `lr`; it then
            follows a cosine down to 0.
        allow_pickle: execute the code in a pickle named by `weights`.

    Raises:
        ModelError: the network cannot be built, or its head not be found.
        MissingFileError: there is no file `weights`.
        WeightsError: `weights` do not fit, are damaged, or would execute code.
        ConfigurationError: a number of the recipe is out of range.
    """

    def __init__(
        self,
        network: str | Callable[[], nn.Module] | nn.Module = "vit_tiny_patch16_224",
        num_classes: int | None = None,
        library: Library = "timm",
        pretrained: bool = False,
        weights: str | Path | None = None,
        network_args: dict[str, Any] | None = None,
        head: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] = (),
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        check_recipe(lr, weight_decay, warmup)
        if num_classes is not None and num_classes < 2:
            raise ModelError(f"`num_classes` is {num_classes}; it must be at least 2")
        self.architecture: Architecture | None
        if isinstance(network, str):
            self.architecture = Architecture(library, network, num_classes, network_args or {})
            # weights that are loaded anyway are not downloaded first
            built = native.build(self.architecture, pretrained and weights is None)
        elif network_args or pretrained:
            raise ModelError(
                "`network_args` and `pretrained` go with a network given by its name; leave them "
                "out or give the name"
            )
        elif isinstance(network, nn.Module):
            self.architecture = None
            built = network
        else:
            built, self.architecture = native.build_from(network)
        # a compiled network would put its prefix before every name; compile the whole model instead
        self.network = getattr(built, "_orig_mod", built)
        self.head_names = _find_heads(self.network, head, num_classes)
        self._head_given = head
        self.num_features, self.num_classes = _size_of_head(self.head)
        if num_classes is not None and num_classes != self.num_classes:
            raise ModelError(
                f"the head '{self.head_names[0]}' of {type(self.network).__name__} has "
                f"{self.num_classes} outputs, but `num_classes` is {num_classes}; "
                "name the last layer by `head`, or correct `num_classes`"
            )
        if class_names and len(class_names) != self.num_classes:
            raise ModelError(
                f"`class_names` has {len(class_names)} names for {self.num_classes} classes; "
                "give one per class"
            )
        self.class_names = tuple(class_names)
        if weights is not None:
            native.load(self.network, weights, allow_pickle)
        known = self.architecture or Architecture("custom")
        if mean is None or std is None:
            default_mean, default_std = native.default_statistics(known, self.network, pretrained)
            mean = default_mean if mean is None else mean
            std = default_std if std is None else std
        if not all(value > 0 for value in std):
            raise ModelError(f"`std` is {tuple(std)}; every value must be positive")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1))
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self._accuracy: dict[str, MulticlassAccuracy] = {}
        # what a checkpoint can bring back; files and downloads are not asked for again
        ignored = ["pretrained", "weights", "allow_pickle"]
        self.save_hyperparameters(
            ignore=ignored if isinstance(network, str) else [*ignored, "network"]
        )

    # ---- capabilities -----------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, C) logits of (B, 3, H, W) images in [0, 1].

        Pure: no hooks and no state, so `torch.func` can transform it.
        """
        return _scores(self.network((images - self.mean) / self.std))

    def features(self, batch: Batch) -> Tensor:
        """Return (B, d), what enters the head.

        Raises:
            ModelError: the head is not called exactly once with a (B, d) input.
        """
        images = (batch["image"] - self.mean) / self.std
        if self._splits:
            return self.network.forward_head(  # type: ignore[operator]
                self.network.forward_features(images),  # type: ignore[operator]
                pre_logits=True,
            )
        return self._captured_features(images)

    def _captured_features(self, images: Tensor) -> Tensor:
        """Run the network and record what enters the head; `images` are normalised."""
        with _calls_of(self.network, self.head_names) as calls:
            scores = _scores(self.network(images))
        parts = []
        for name, seen in calls.items():
            if len(seen) != 1:
                raise ModelError(
                    f"the head '{name}' was called {len(seen)} times in one forward pass, so "
                    "there are no unique features; name another layer by `head`"
                )
            entered, left = seen[0]
            if entered.ndim != 2:
                raise ModelError(
                    f"the head '{name}' received an input of shape {tuple(entered.shape)} "
                    "instead of (B, d); name a layer behind the pooling by `head`"
                )
            if len(calls) == 1 and left is not scores:
                raise ModelError(
                    f"{type(self.network).__name__} does not return what its head '{name}' gives, "
                    "so logits cannot be computed from features; name the last layer by `head`"
                )
            parts.append(entered)
        return torch.cat(parts, dim=1)

    def logits(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B, C) logits, from `features` if given."""
        if features is None:
            return self(batch["image"])
        return self.head(features)

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B,) cross-entropies in nats.

        Raises:
            AccessError: the batch has no labels.
        """
        if "label" not in batch:
            raise AccessError(
                "the loss needs labels, which this batch does not carry; declare them in the "
                "method's `access`"
            )
        scores = self.logits(batch, features)
        return F.cross_entropy(scores.float(), batch["label"], reduction="none")

    @property
    def head(self) -> nn.Module:
        """The last layer: (B, d) features to (B, C) logits."""
        layers = [self.network.get_submodule(name) for name in self.head_names]
        return layers[0] if len(layers) == 1 else MeanHead(layers)

    def sites(self, kind: SiteKind) -> list[Site]:
        """Return the layers of one kind; see `mmforget.models.ffn_sites.find_sites`."""
        return find_sites(self.network, kind, self.head_names)

    @property
    def _splits(self) -> bool:
        """Whether timm's own way to the features ends right before a single linear head."""
        return (
            self._head_given is None
            and hasattr(self.network, "forward_features")
            and hasattr(self.network, "forward_head")
            and isinstance(self.head, nn.Linear)
        )

    # ---- saving and rebuilding ----------------------------------------------------------------

    def save_native(self, folder: Path) -> None:
        """Write the weights as the network's library would; `mmforget.models.base.Model`."""
        saved = Saved(
            architecture=self._recognised() or Architecture("custom"),
            mean=native.plain(self.mean.flatten().tolist()),
            std=native.plain(self.std.flatten().tolist()),
            class_names=self.class_names,
            head=self._head_given,
        )
        native.save(self.network, saved, Path(folder))

    def fresh(self, seed: int) -> Self:
        """Build the same model with newly drawn weights, in training mode.

        Args:
            seed: decides the weights; the global random generator is left as it is.

        Raises:
            ModelError: the network was given as an object, and not by timm or transformers.
        """
        architecture = self._recognised()
        if architecture is None:
            raise ModelError(
                f"{type(self.network).__name__} was given as an object, so it cannot be built "
                "again; give `network` as a name, as the import path of a class "
                "(library='custom') or as a function that builds it"
            )
        return self.with_network(seed, lambda: native.redrawn(architecture, self.network))

    def _recognised(self) -> Architecture | None:
        """How the network is built, also if it was given as an object of timm or transformers."""
        if self.architecture is None:
            self.architecture = native.recognise(self.network)
        return self.architecture

    # ---- training -----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._accuracy = {}

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._accuracy = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count correct predictions."""
        self._count("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count correct predictions."""
        self._count("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``, or ``val/accuracy/<name>`` per loader."""
        self._log_accuracy()

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, or ``test/accuracy/<name>`` per loader."""
        self._log_accuracy()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return ids (B,), predicted classes (B,) and probabilities (B, C), without padding."""
        real = batch["weight"] > 0
        probability = self.logits(batch)[real].float().softmax(dim=1)
        return {
            "id": batch["id"][real],
            "prediction": probability.argmax(dim=1),
            "probability": probability,
        }

    def _count(self, stage: str, batch: Batch, loader: int) -> None:
        name = f"{stage}/accuracy{self.role_of(stage, loader)}"
        if name not in self._accuracy:
            metric = MulticlassAccuracy(self.num_classes, average="micro")
            self._accuracy[name] = metric.to(self.device)
        real = batch["weight"] > 0
        self._accuracy[name].update(self.logits(batch)[real], batch["label"][real])

    def _log_accuracy(self) -> None:
        for name, metric in self._accuracy.items():
            self.log(name, metric.compute(), prog_bar=True)  # compute adds up all processes
        self._accuracy = {}


class MeanHead(nn.Module):
    """Several heads with inputs of their own, averaged: DeiT's class and distillation tokens.

    Shape: (B, d1 + d2 + …) concatenated features to (B, C) logits.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        sizes = [_size_of_head(layer) for layer in layers]
        self.widths = [size[0] for size in sizes]
        self.in_features = sum(self.widths)
        self.out_features = sizes[0][1]

    def forward(self, features: Tensor) -> Tensor:
        """Average the logits that each head gives for its part of the features."""
        parts = features.split(self.widths, dim=1)
        scores = [layer(part) for layer, part in zip(self.layers, parts, strict=True)]
        return torch.stack(scores).sum(dim=0) / len(scores)


def load_classifier(
    source: str | Path,
    network: str | Callable[[], nn.Module] | nn.Module | None = None,
    num_classes: int | None = None,
    library: Library = "timm",
    network_args: dict[str, Any] | None = None,
    head: str | None = None,
    allow_pickle: bool = False,
) -> ImageClassifier:
    """Load a trained classifier, in evaluation mode.

    Args:
        source: a folder saved by timm, transformers or mmforget (a native folder or an artifact); a
            hub id ``owner/name`` of timm or transformers; or a file of weights for `network`.
        network: what the weights belong to. Needed for a file, and for the folder of a user's
            network whose arguments nobody recorded; a folder else knows its network.
        num_classes: number of classes of `network`.
        library: who knows `network`; see `ImageClassifier`.
        network_args: further arguments for the builder of `network`.
        head: qualified name of its last layer where it cannot be found by itself.
        allow_pickle: execute the code in a pickle. Only for files from a source you trust.

    Raises:
        MissingFileError: there is no such file, folder or hub id.
        WeightsError: the weights are damaged, do not fit, are an adapter, or would execute code.
        ModelError: the network cannot be built.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if network is None:
            raise ModelError(
                f"'{path}' holds weights only; say by `network` (and `num_classes`, "
                "`network_args`) what they belong to, or give a folder with its config.json"
            )
        return ImageClassifier(
            network,
            num_classes,
            library,
            weights=path,
            network_args=network_args,
            head=head,
            allow_pickle=allow_pickle,
        ).eval()
    if not path.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise MissingFileError(
                f"there is no '{source}'; give a file, a folder, or a hub id of the form "
                "'owner/name'"
            )
        path = native.hub_folder(str(source))
    saved = native.read_description(path)
    architecture = saved.architecture
    if network is None and architecture.library == "custom" and not architecture.name:
        raise ModelError(
            f"'{path}' holds a network that was given as an object, so it cannot be built again; "
            "give it as `network`"
        )
    return ImageClassifier(
        architecture.name if network is None else network,
        architecture.num_classes if num_classes is None else num_classes,
        architecture.library if network is None else library,
        weights=native.weights_file(path),
        network_args=architecture.args if network is None else network_args,
        head=saved.head if head is None else head,
        mean=saved.mean,
        std=saved.std,
        class_names=saved.class_names,
        allow_pickle=allow_pickle,
    ).eval()


def _find_heads(network: nn.Module, given: str | None, num_classes: int | None) -> tuple[str, ...]:
    """Qualified names of the layers that give the class scores."""
    names = {id(module): name for name, module in network.named_modules()}
    if given is not None:
        if given not in names.values():
            raise ModelError(f"{type(network).__name__} has no layer `head` '{given}'")
        return (given,)
    if hasattr(network, "get_classifier"):  # timm
        found = network.get_classifier()  # type: ignore[operator]
        layers = found if isinstance(found, tuple | list | nn.ModuleList) else (found,)
        if all(id(layer) in names and len(_linear_layers(layer)) == 1 for layer in layers):
            return tuple(names[id(layer)] for layer in layers)
    linear = _linear_layers(network)
    fitting = [
        name for name, layer in linear if num_classes is None or layer.out_features == num_classes
    ]
    if not fitting:
        found_sizes = f" (its last one has {linear[-1][1].out_features})" if linear else ""
        raise ModelError(
            f"{type(network).__name__} has no linear layer with {num_classes} outputs{found_sizes};"
            " check `num_classes`, or name the last layer by `head`"
        )
    return (fitting[-1],)


def _linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def _size_of_head(head: nn.Module) -> tuple[int, int]:
    """Number of features and of classes of a head."""
    inside = _linear_layers(head)
    if len(inside) == 1:  # itself, or wrapped with a normalisation
        return inside[0][1].in_features, inside[0][1].out_features
    weight = getattr(head, "weight", None)
    inputs = getattr(head, "in_features", None)
    outputs = getattr(head, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    if isinstance(weight, Tensor) and weight.ndim >= 2:  # a convolution or a margin head
        return weight.shape[1], weight.shape[0]
    raise ModelError(
        f"the head {type(head).__name__} has neither `in_features` and `out_features` nor a "
        "(C, d) `weight`; give it these attributes or name another layer by `head`"
    )


def _scores(output: Any) -> Tensor:
    """The (B, C) logits in what a network returns: a tensor, a tuple, a dict or a ModelOutput."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):  # named tuples of torchvision
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the network returned a {type(output).__name__}; it must return (B, C) logits, a "
            "tuple that begins with them, or a mapping with the key 'logits'"
        )
    return output


@contextmanager
def _calls_of(
    network: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record input and output of some layers during the calls inside of the block."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, output: calls[name].append((args[0], output))

    hooks = [network.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
