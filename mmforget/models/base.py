"""What a model offers to forgetting methods: small protocols, checked at run time.

A method names in `requires` the capabilities that it needs; a model offers one by having its
methods. A model never knows a method, and a method never names a concrete model class.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    cast,
    runtime_checkable,
)

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.errors import CapabilityError

if TYPE_CHECKING:
    from mmforget.models.multimodal import AnswerLogits

Batch = Mapping[str, Any]
"""A batch: ``image`` (B, 3, H, W) float in [0, 1]; ``label`` (B,) int64, absent where a method may
not read labels; ``id`` (B,) int64; ``weight`` (B,) float, 1 for a sample and 0 for the padding that
makes the batches of several processes equally long. A batch of scenes has a label per object,
(B, K) with -1 where there is none, and ``boxes``, ``crowd`` and ``extent``; see
`mmforget.data.detection.DetectionDataset`. A batch of questions has ``images``, ``question`` and
``answer`` instead of ``image``; see `mmforget.data.questions.QuestionDataset`."""


class LossParts(NamedTuple):
    """A training loss in the part that forgetting reverses and the part that it keeps.

    Attributes:
        recognition: (B,) what the model says it is: all of a classifier's loss.
        rest: (B,) everything else, such as where a detector draws its boxes; None if there is
            nothing else.
    """

    recognition: Tensor
    rest: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """(B,) the loss."""
        return self.recognition if self.rest is None else self.recognition + self.rest


class Instances(NamedTuple):
    """The labelled things of a batch as a model sees them: its images, or the objects in them.

    Attributes:
        features: (M, d) what enters the head.
        logits: (M, C) class scores.
        label: (M,) int64 classes.
        row: (M,) int64 rows of the batch.
        loss: (B,) parts of the training loss, from the same forward pass.
        right: (M,) bool whether the model says what is true, where its scores are none of the
            classes, such as those of tokens; else None.
    """

    features: Tensor
    logits: Tensor
    label: Tensor
    row: Tensor
    loss: LossParts
    right: Tensor | None = None

    @property
    def correct(self) -> Tensor:
        """(M,) bool: whether the model says what is true."""
        return self.logits.argmax(1) == self.label if self.right is None else self.right


SiteKind = Literal["ffn", "attention", "cross_attention", "text_reading", "all"]


class Site(NamedTuple):
    """One weight layer inside a network.

    Attributes:
        name: qualified name, valid for `torch.nn.Module.get_submodule` on `Sites.network`.
        module: the layer (`nn.Linear` or `nn.Conv2d`).
        block: qualified name of the block it belongs to; the layers of one block form one group.
    """

    name: str
    module: nn.Module
    block: str


@runtime_checkable
class HasLoss(Protocol):
    """The family's own training loss, one value per sample."""

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B,) losses. `features` of the same batch, if given, spare the forward pass."""
        ...


@runtime_checkable
class HasLogits(Protocol):
    """Class scores."""

    num_classes: int

    def logits(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B, C) logits. `features` of the same batch, if given, spare the forward pass."""
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """The representation that enters the head."""

    num_features: int

    def features(self, batch: Batch) -> Tensor:
        """Return (B, d) features, before any head dropout."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """The last layer, which maps features to class scores."""

    @property
    def head(self) -> nn.Module:
        """The head; methods that forget in the features keep it frozen."""
        ...


@runtime_checkable
class Answers(Protocol):
    """A network that answers questions about pictures, token by token."""

    network: nn.Module

    def answer(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        """Return one text per question; ``images`` are its pictures, none for text only."""
        ...

    def answer_logits(self, batch: Batch) -> AnswerLogits:
        """Return the scores of all tokens at the last places of each row, where answers stand."""
        ...


class TextLayer(NamedTuple):
    """A linear layer whose input is a function of the prompt alone.

    Attributes:
        name: qualified name in the network.
        module: the layer.
        reads: ``states`` (one row per token) or ``pooled`` (one row per prompt).
        columns: number of leading input columns that come from the text; the others, such as the
            size of the picture in SDXL, are not touched.
    """

    name: str
    module: nn.Linear
    reads: Literal["states", "pooled"]
    columns: int


@dataclass(frozen=True)
class Segment:
    """The stretch of a prompt's token states that one tokenizer is responsible for.

    Attributes:
        start: first position in the states.
        ids: (B, n) token ids, padded.
        content: (B, n) bool, true for the tokens of the text itself: no begin, end or padding.
        begin: number of special tokens before the text.
    """

    start: int
    ids: Tensor
    content: Tensor
    begin: int


@dataclass(frozen=True)
class PromptEmbedding:
    """What a prompt becomes before it enters the denoiser.

    Attributes:
        states: (B, L, d) one row per token.
        pooled: (B, p) one row per prompt, None where the family has none.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self.states)

    def __getitem__(self, rows: Any) -> PromptEmbedding:
        """Some of the prompts: a slice or an index tensor."""
        return PromptEmbedding(
            self.states[rows], None if self.pooled is None else self.pooled[rows]
        )

    @staticmethod
    def cat(parts: Sequence[PromptEmbedding]) -> PromptEmbedding:
        """Concatenate along the prompts."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return PromptEmbedding(
            torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None
        )


@runtime_checkable
class TextConditioned(Protocol):
    """A network that is steered by prompts."""

    network: nn.Module

    def encode(self, prompts: Sequence[str]) -> PromptEmbedding:
        """Return the embeddings; raise `RequestError` for a prompt that would be truncated."""
        ...

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raise `RequestError` for a prompt that would be truncated, without any computing."""
        ...

    def unconditional(self) -> PromptEmbedding:
        """Return one row: the embedding that stands for no prompt at all."""
        ...

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Which positions of the token states belong to which tokens."""
        ...

    def text_layers(self) -> list[TextLayer]:
        """The layers that read text, in forward order; raise `CapabilityError` if none."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A network that makes pictures."""

    def generate(self, condition: Sequence[str], n: int, seed: int) -> Tensor:
        """Return (len(condition) * n, 3, H, W) in [0, 1], the n pictures of a condition in a row.

        A picture depends on its condition, its number and the seed only.
        """
        ...


LatentSpace = Literal["z", "w", "w+"]


@dataclass(frozen=True)
class Latents:
    """What a generator draws from, in one of its spaces.

    Attributes:
        codes: (n, d) for ``z`` and ``w``, (n, layers, d) for ``w+``.
        labels: (n,) int64 classes of a conditional generator, else None.
        space: where the codes live.
    """

    codes: Tensor
    labels: Tensor | None = None
    space: LatentSpace = "z"

    def __len__(self) -> int:
        """Count the latents."""
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Latents:
        """Some of them: a slice or an index tensor."""
        labels = None if self.labels is None else self.labels[rows]
        return Latents(self.codes[rows], labels, self.space)

    def moved(self, codes: Tensor) -> Latents:
        """The same classes and space at other codes."""
        return Latents(codes, self.labels, self.space)

    @staticmethod
    def cat(parts: Sequence[Latents]) -> Latents:
        """Concatenate latents of one space."""
        labels = [part.labels for part in parts if part.labels is not None]
        return Latents(
            torch.cat([part.codes for part in parts]),
            torch.cat(labels) if labels else None,
            parts[0].space,
        )


@runtime_checkable
class HasLatents(Protocol):
    """A generator that draws from latent vectors which can be held fixed and moved."""

    network: nn.Module

    def draw(
        self, n: int, seed: int, first: int = 0, labels: Tensor | None = None, purpose: str = ""
    ) -> Latents:
        """Return n latents of the prior; the latent of a number is always the same."""
        ...

    def mapped(self, latents: Latents, space: LatentSpace | None = None) -> Latents:
        """Return latents in another space; None takes the one that the network draws from."""
        ...

    def synthesise(self, latents: Latents) -> Tensor:
        """Return (n, 3, H, W) pictures in [0, 1], differentiable in weights and codes."""
        ...

    def layer_groups(self) -> dict[str, list[str]]:
        """Return the names of the network's parameters by group, in forward order."""
        ...


@runtime_checkable
class Sites(Protocol):
    """Layers of the network by their function."""

    network: nn.Module

    def sites(self, kind: SiteKind) -> list[Site]:
        """Return the layers in forward order; raise `CapabilityError` if there is none."""
        ...


class Model(LightningModule):
    """Base of all model families: a Lightning module that owns one native `network`."""

    network: nn.Module

    find_unused_parameters: ClassVar[bool] = False
    """Whether the loss leaves weights out, which `DistributedDataParallel` must be told."""

    @abstractmethod
    def save_native(self, folder: Path) -> None:
        """Write the weights in the format of the library that owns the network.

        Args:
            folder: an existing, empty folder.
        """

    def loss_parts(self, batch: Batch) -> LossParts:
        """The training loss per sample, by what forgetting reverses and what it keeps.

        A family whose loss has parts that are no recognition overrides this.
        """
        own: Any = self  # offers `HasLoss`
        return LossParts(own.loss(batch))

    def training_loss(self, batch: Batch) -> Tensor:
        """(B,) what training from scratch minimises: the loss and what helps it to converge."""
        own: Any = self  # offers `HasLoss`
        return cast(Tensor, own.loss(batch))

    def instances(self, batch: Batch) -> Instances:
        """What the batch holds, as the model sees it; of a classifier one instance per image.

        A family whose samples hold several things overrides this. Needs labels.
        """
        own: Any = self  # offers `HasFeatures`, `HasLogits` and `HasLoss`
        features = own.features(batch)
        loss = own.loss(batch, features=features)
        return Instances(
            features=features,
            logits=own.logits(batch, features=features),
            label=batch["label"],
            row=torch.arange(len(loss), device=loss.device),
            loss=LossParts(loss),
        )

    @property
    def forget_bound(self) -> float:
        """The recognition loss at which a sample counts as unknown: ``2 ln C``.

        Twice the cross-entropy of a uniform prediction over C classes.
        """
        own: Any = self  # offers `HasLogits`
        return 2 * math.log(own.num_classes)

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """The layers that score classes, each with the rows of its weight that score these.

        Args:
            classes: class indices.

        Returns:
            Layers with a ``weight``; none if the head has another form.
        """
        own: Any = self  # offers `HasHead` and `HasLogits`
        return [
            (layer, list(classes))
            for layer in own.head.modules()
            if isinstance(layer, nn.Linear) and layer.out_features == own.num_classes
        ]

    @abstractmethod
    def fresh(self, seed: int) -> Self:
        """Build the same architecture with newly drawn weights, none of them inherited.

        Raises:
            ModelError: the network was given as an object, so nobody knows how it is built.
        """


def check_capabilities(method: str, model: nn.Module, requires: tuple[type, ...]) -> None:
    """Refuse a model that lacks what a method needs.

    Raises:
        CapabilityError: names the method, the model and everything that is missing.
    """
    missing = [need.__name__ for need in requires if not isinstance(model, need)]
    if missing:
        raise CapabilityError(
            f"{method} needs {' and '.join(missing)}, which {type(model).__name__} does not offer; "
            "choose another method (`mmforget list methods`) or implement the protocol"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch off training and the gradients of all weights for a while."""
    modes = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, need in needed:
            parameter.requires_grad_(need)


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
