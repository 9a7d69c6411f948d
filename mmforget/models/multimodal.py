"""Multimodal language models of transformers, as one Lightning module."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import AccessError, ConfigurationError, DataError, ModelError
from mmforget.models import multimodal_files
from mmforget.models.base import Batch, Instances, LossParts, Site, SiteKind
from mmforget.models.ffn_sites import find_sites
from mmforget.models.multimodal_files import Dtype
from mmforget.models.multimodals.base import (
    Inputs,
    MultimodalFamily,
    Part,
    family_of,
    has_adapters,
    unwrapped,
)
from mmforget.models.multimodals.encoding import IGNORED, LabelScope, Padding, encode
from mmforget.models.recipe import TrainedModel, check_recipe


class AnswerLosses(NamedTuple):
    """How surely a model gives the answers of a batch.

    Attributes:
        total: (B,) ``-log p(answer)``: the sum over the labelled tokens.
        tokens: (B,) number of labelled tokens.
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """(B,) the loss per token."""
        return self.total / self.tokens.clamp(min=1)


class AnswerLogits(NamedTuple):
    """What a model says at the places where the answers stand.

    Attributes:
        logits: (B, K, V) scores that predict `labels`.
        labels: (B, K) token ids, -100 where nothing is labelled.
        hidden: (B, K, D) what entered the head.
    """

    logits: Tensor
    labels: Tensor
    hidden: Tensor

    def losses(self) -> AnswerLosses:
        """Cross-entropy of the labelled tokens, in fp32."""
        each = F.cross_entropy(
            self.logits.float().flatten(0, 1),  # six times as fast as over a transposed axis
            self.labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view_as(self.labels)
        return AnswerLosses(each.sum(dim=1), (self.labels != IGNORED).sum(dim=1))


class Rewriter(Protocol):
    """Changes the inputs of a network on their way to it; see `MultimodalLM.rewriting`."""

    def reduced(
        self, network: nn.Module, inputs: Inputs, pictures: Sequence[Sequence[Tensor]] | None = None
    ) -> dict[str, Any]:
        """Return other inputs for the same network."""


class MultimodalLM(TrainedModel):
    """A network that answers questions about pictures, with its processor and its parts by name.

    LLaVA 1.5, Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM and InternVL of transformers. A batch holds
    ``images`` (per sample a list of uint8 (3, H, W), empty for a text), ``question`` and ``answer``
    (texts), ``id`` and ``weight`` (B,), and ``label`` (B,), the class that an answer reveals. Every
    loss covers the tokens of the answer and of the end of the turn, and nothing else.

    Args:
        network: a folder or hub id of transformers, or a network.
        processor: of a network that is given as an object.
        pretrained: read the weights of a folder; False draws new ones.
        dtype: of the weights of a folder; ``auto`` takes what it says.
        trained: parts that are trained; all others are frozen. Parts are ``vision``,
            ``projector``, ``language``, ``head`` and ``other``. A network with adapters of peft is
            left as peft has frozen it.
        adapted: parts whose layers `sites` lists, for adapters.
        max_length: most tokens of a question with its pictures and its answer; None: no limit.
        max_new_tokens: most tokens of an answer.
        lr: highest learning rate of AdamW.
        weight_decay: decoupled, for weights of at least two dimensions.
        warmup: share of the steps in [0, 1) over which the rate rises from 0 to `lr`; it then
            follows a cosine down to 0.

    Raises:
        ModelError: the network or its processor cannot be built, or is none that mmforget knows.
        MissingFileError: there is no such folder or hub id.
        WeightsError: the weights do not fit, are damaged, or would execute code.
        ConfigurationError: a number of the recipe is out of range, or an unknown part.
    """

    find_unused_parameters = True  # the last block of a tower whose features are taken earlier
    rewriter: Rewriter | None = None

    def __init__(
        self,
        network: str | Path | nn.Module,
        processor: Any = None,
        pretrained: bool = True,
        dtype: Dtype = "float32",
        trained: Sequence[Part] = ("projector", "language", "head"),
        adapted: Sequence[Part] = ("language",),
        max_length: int | None = None,
        max_new_tokens: int = 32,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        check_recipe(lr, weight_decay, warmup)
        if max_new_tokens < 1:
            raise ConfigurationError(f"`max_new_tokens` is {max_new_tokens}; it must be at least 1")
        for name, parts in (("trained", trained), ("adapted", adapted)):
            if not parts or (unknown := set(parts) - set(get_args(Part))):
                shown = "', '".join(sorted(unknown)) if parts else ""
                raise ConfigurationError(
                    f"`{name}` is {list(parts)}; name one or more of {', '.join(get_args(Part))}"
                    + (f", not '{shown}'" if shown else "")
                )
        self.network: Any
        if isinstance(network, nn.Module):
            self.network, self.processor = network, processor
        else:
            folder = multimodal_files.located(network)
            self.network, own = multimodal_files.build(folder, pretrained, dtype)
            self.processor = processor or own
        if self.processor is None:
            raise ModelError(
                f"{type(network).__name__} was given without `processor`; questions and pictures "
                "cannot be encoded without it"
            )
        self.family: MultimodalFamily = family_of(self.network)
        self.trained, self.adapted = tuple(trained), tuple(adapted)
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self._freeze()
        ignored = ["processor", "pretrained"]
        given = isinstance(network, nn.Module)
        self.save_hyperparameters(ignore=[*ignored, "network"] if given else ignored)

    def _freeze(self) -> None:
        if has_adapters(self.network):
            return  # peft has frozen all but its adapters
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self.family.part(name) in self.trained)
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise ConfigurationError(
                f"`trained` is {list(self.trained)}, but {type(self.network).__name__} has no "
                "parameters there"
            )

    @property
    def num_features(self) -> int:
        """Width of the language model."""
        return int(self.family.language_model(unwrapped(self.network)).config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the head scores."""
        return int(self.head.weight.shape[0])

    # ---- encoding -------------------------------------------------------------------------------

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        configured = self.network.generation_config.eos_token_id
        ids = configured if isinstance(configured, list | tuple) else [configured]
        own = self.processor.tokenizer.eos_token_id
        return tuple(sorted({int(one) for one in (*ids, own) if one is not None}))

    def inputs(
        self,
        batch: Batch,
        padding: Padding = "right",
        answers: bool = True,
        label_scope: LabelScope = "answer",
    ) -> dict[str, Any]:
        """Encode a batch; on the device and in the type of the network.

        Args:
            batch: see the class.
            padding: side of the padding.
            answers: add the answers, and ``labels`` for them.
            label_scope: see `mmforget.models.multimodals.encoding.encode`.

        Raises:
            AccessError: answers are wanted, but the batch has none.
            DataError: a row whose pictures do not become visual tokens, or see `encode`.
        """
        if answers and "answer" not in batch:
            raise AccessError(
                "the loss of a multimodal language model needs answers, which this batch does not "
                "carry; declare labels in the method's `access`"
            )
        multimodal_files.check_device(self.network)
        pictures = batch["images"]
        found = encode(
            self.processor,
            pictures,
            batch["question"],
            batch["answer"] if answers else None,
            end_ids=self.end_ids,
            image_ids=self.family.image_token_ids(unwrapped(self.network)),
            padding=padding,
            label_scope=label_scope,
            max_length=self.max_length,
            nested=self.family.nested_pictures,
        )
        self._check_pictures(found["input_ids"], pictures)
        like = next(self.network.parameters())
        found = {
            key: value.to(like.device, like.dtype if value.is_floating_point() else None)
            for key, value in found.items()
        }
        if self.rewriter is None:
            return found
        return self.rewriter.reduced(self.network, found, pictures)

    @contextmanager
    def rewriting(self, rewriter: Rewriter) -> Iterator[None]:
        """Within the context, all that `inputs` returns passes `rewriter` first.

        Raises:
            ConfigurationError: a rewriter is at work already.
        """
        if self.rewriter is not None:
            raise ConfigurationError(
                f"{type(self.rewriter).__name__} already rewrites the inputs of this model; leave "
                "its context first"
            )
        self.rewriter = rewriter
        try:
            yield
        finally:
            self.rewriter = None

    def _check_pictures(self, input_ids: Tensor, pictures: Sequence[Sequence[Tensor]]) -> None:
        shown = self.family.visual_mask(unwrapped(self.network), input_ids).any(dim=1).tolist()
        for row, (seen, given) in enumerate(zip(shown, pictures, strict=True)):
            if seen != bool(given):
                raise DataError(
                    f"row {row} of the batch has {len(given)} pictures, but its encoded question "
                    f"{'has' if seen else 'lacks'} visual tokens; check the chat template"
                )

    # ---- capabilities ---------------------------------------------------------------------------

    def answer_logits(self, batch: Batch) -> AnswerLogits:
        """Scores at the answers of a batch, from one forward pass."""
        inputs = self.inputs(batch)
        labels = inputs.pop("labels")
        first = int((labels != IGNORED).int().argmax(dim=1).min())
        logits, hidden = self._scores(inputs, labels.shape[1] - first + 1)
        return AnswerLogits(logits[:, :-1], labels[:, first:], hidden[:, :-1])

    def _scores(self, inputs: dict[str, Any], last: int) -> tuple[Tensor, Tensor]:
        """Logits (B, last, V) and hidden states (B, last, D) at the end of each row."""
        network: Any = unwrapped(self.network)
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        try:
            self.family.check_images(network, inputs)
            output = self.network(
                **self.family.model_inputs(inputs), logits_to_keep=last, use_cache=False
            )
        finally:
            handle.remove()
        return output.logits, seen[-1]

    def token_losses(self, batch: Batch) -> AnswerLosses:
        """Sum of the loss over the tokens of each answer, and their number."""
        return self.answer_logits(batch).losses()

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B,) losses per token of the answer. `features` do not spare a pass here."""
        return self.token_losses(batch).mean

    def features(self, batch: Batch) -> Tensor:
        """Return (B, D): what enters the head at the last token of the question."""
        inputs = self.inputs(batch, padding="left", answers=False)
        return self._scores(inputs, 1)[1][:, -1]

    def instances(self, batch: Batch) -> Instances:
        """The samples of a batch; scores are those of all tokens at the start of the answer."""
        found = self.answer_logits(batch)
        rows = torch.arange(len(found.labels), device=found.labels.device)
        start = (found.labels != IGNORED).int().argmax(dim=1)
        return Instances(
            features=found.hidden[rows, start],
            logits=found.logits[rows, start],
            label=batch["label"],
            row=rows,
            loss=LossParts(found.losses().mean),
            right=((found.logits.argmax(-1) == found.labels) | (found.labels == IGNORED)).all(1),
        )

    @property
    def forget_bound(self) -> float:
        """The loss per token at which an answer counts as unknown: ``ln V``.

        That of a uniform prediction over V tokens; the end of the turn stays easy to predict, so
        the tokens that matter are less likely than by chance when the mean gets there.
        """
        return math.log(self.vocabulary)

    @property
    def head(self) -> Any:
        """The layer that scores the tokens."""
        return unwrapped(self.network).get_submodule(self.family.head)

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """None: the head scores tokens, and no token is a class."""
        return []

    def sites(self, kind: SiteKind) -> list[Site]:
        """Return the layers of one kind in the parts `adapted`; see `find_sites`."""
        found = find_sites(self.network, kind, (self.family.head,))
        inside = [site for site in found if self.family.part(site.name) in self.adapted]
        if not inside:
            raise ConfigurationError(
                f"`adapted` is {list(self.adapted)}, where there are no layers of kind '{kind}'; "
                "name other parts"
            )
        return inside

    # ---- answers --------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self,
        images: Sequence[Sequence[Tensor]],
        questions: Sequence[str],
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        **generation: Any,
    ) -> list[str]:
        """Answer questions, greedily unless told otherwise.

        Args:
            images: per question a list of pictures, uint8 (3, H, W); empty lists are texts.
            questions: texts.
            max_new_tokens: most tokens; None takes the model's.
            batch_size: of the questions that are answered together.
            **generation: further arguments of transformers' ``generate``.

        Returns:
            One text per question, without special tokens and outer white space.

        Raises:
            DataError: the numbers of questions and of lists of pictures differ, or see `inputs`.
        """
        if len(images) != len(questions):
            raise DataError(
                f"there are {len(questions)} questions, but {len(images)} lists of pictures; give "
                "one list per question, empty without a picture"
            )
        training = self.network.training
        self.network.eval()
        try:
            return [
                text
                for start in range(0, len(questions), batch_size)
                for text in self._answer(
                    {
                        "images": images[start : start + batch_size],
                        "question": questions[start : start + batch_size],
                    },
                    max_new_tokens or self.max_new_tokens,
                    generation,
                )
            ]
        finally:
            self.network.train(training)

    def _answer(self, batch: Batch, length: int, generation: dict[str, Any]) -> list[str]:
        inputs = self.inputs(batch, padding="left", answers=False)
        start = inputs["input_ids"].shape[1]
        options = {"do_sample": False, "max_new_tokens": length, "eos_token_id": [*self.end_ids]}
        ids = self.network.generate(**self.family.model_inputs(inputs), **(options | generation))
        texts = self.processor.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    # ---- saving and rebuilding ------------------------------------------------------------------

    def save_native(self, folder: Path) -> None:
        """Write network and processor as transformers would; `mmforget.models.base.Model`."""
        multimodal_files.save(self.network, self.processor, Path(folder))

    def fresh(self, seed: int) -> Self:
        """Build the same model with newly drawn weights, in training mode.

        Args:
            seed: decides the weights; the global random generator is left as it is.

        Raises:
            ModelError: the network carries adapters.
        """
        new = self.with_network(seed, lambda: multimodal_files.fresh(self.network))
        new._freeze()
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the weights; the processor, which nothing changes, is shared."""
        memo[id(self.processor)] = self.processor
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            if name != "rewriter":  # belongs to a context that the copy is not in
                new.__dict__[name] = copy.deepcopy(value, memo)
        return new

    # ---- evaluation -----------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss``, or ``val/loss/<role>`` per loader."""
        self._log_loss("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test/loss`` and ``test/exact``, or those of each role."""
        self._log_loss("test", batch, dataloader_idx)
        role, weight = self.role_of("test", dataloader_idx), batch["weight"]
        given = self.answer(batch["images"], batch["question"])
        right = [one == other for one, other in zip(given, batch["answer"], strict=True)]
        hits = (torch.tensor(right, device=weight.device) * weight).sum()
        self._log_mean(f"test/exact{role}", hits, weight)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return ids (B,), questions and answers."""
        real = (batch["weight"] > 0).tolist()
        given = self.answer(batch["images"], batch["question"])
        rows = [row for row, kept in enumerate(real) if kept]
        return {
            "id": batch["id"][batch["weight"] > 0],
            "question": [batch["question"][row] for row in rows],
            "answer": [given[row] for row in rows],
        }

    def _log_loss(self, stage: str, batch: Batch, loader: int) -> None:
        weight = batch["weight"]
        total = (self.loss(batch) * weight).sum()
        self._log_mean(f"{stage}/loss{self.role_of(stage, loader)}", total, weight)

    def _log_mean(self, name: str, total: Tensor, weight: Tensor) -> None:
        number = weight.sum().clamp(min=1)
        self.log(
            name,
            total / number,
            batch_size=int(number),
            add_dataloader_idx=False,
            sync_dist=True,
            prog_bar=True,
        )


def load_multimodal(source: str | Path, dtype: Dtype = "float32", **settings: Any) -> MultimodalLM:
    """Load a trained multimodal language model, in evaluation mode.

    Args:
        source: a folder saved by transformers or mmforget, or a hub id ``owner/name``.
        dtype: of the weights; ``auto`` takes what the folder says.
        **settings: further arguments of `MultimodalLM`.

    Raises:
        MissingFileError: there is no such folder or hub id.
        WeightsError: the weights are damaged, do not fit, or would execute code.
        ModelError: it is none of the supported families.
    """
    return MultimodalLM(source, dtype=dtype, **settings).eval()
