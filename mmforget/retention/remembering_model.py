"""A multimodal language model whose visual tokens are refreshed between the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmforget.errors import ConfigurationError, WeightsError
from mmforget.models.base import Batch
from mmforget.models.multimodal import AnswerLogits, MultimodalLM
from mmforget.models.multimodal_files import Dtype
from mmforget.models.multimodals.base import Part
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.models.recipe import WarmupCosine
from mmforget.retention.vision_remember import VisionRemember


class RememberingLM(MultimodalLM):
    """A multimodal language model with `VisionRemember` modules, which are trained with it.

    Answers, losses and features go through the modules. The paper trains in stages; ours: first
    the projector and the modules (the default of `trained`), then all but the tower. The modules
    are trained in every stage, with the rate of the projector; their gates, single numbers that
    start closed and let nothing through at first, with `gate_rate` times that.

    `network` stays an ordinary network of transformers: `save_native` writes it as ever, and the
    modules beside it; whoever loads the folder with transformers has it without them.

    Args:
        network, processor, pretrained, dtype, max_length, max_new_tokens, lr, weight_decay, warmup:
            see `MultimodalLM`.
        trained: parts of the network that are trained besides the modules.
        gate_rate: times `lr` is the learning rate of the gates; positive.
        after, levels, inner, heads, window, saliency, text_guided, share, seed: see
            `VisionRemember.for_model`.

    Raises:
        CapabilityError: the projector's tokens form no grid.
        ConfigurationError: a setting out of range; see also `MultimodalLM`.

    Attributes:
        remember: the modules.
    """

    def __init__(
        self,
        network: str | Path | nn.Module,
        processor: Any = None,
        pretrained: bool = True,
        dtype: Dtype = "float32",
        trained: Sequence[Part] = ("projector",),
        max_length: int | None = None,
        max_new_tokens: int = 32,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        gate_rate: float = 20.0,
        after: Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        inner: int | None = None,
        heads: int = 4,
        window: int | None = None,
        saliency: bool = True,
        text_guided: bool = False,
        share: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            network,
            processor,
            pretrained,
            dtype,
            trained,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
        )
        if not gate_rate > 0:
            raise ConfigurationError(f"`gate_rate` is {gate_rate}, it must be positive")
        self.gate_rate = gate_rate
        self.remember = VisionRemember.for_model(
            self, after, levels, inner, heads, window, saliency, text_guided, share, seed
        )

    @contextmanager
    def remembering(self, prompt: Tensor | None = None) -> Iterator[None]:
        """Refresh visual tokens in everything that the network does while the context is open.

        Args:
            prompt: see `VisionRemember.attached`.
        """
        with self.remember.attached(self.network, prompt):
            yield

    def answer_logits(self, batch: Batch) -> AnswerLogits:
        """Scores at the answers of a batch, from one forward pass."""
        inputs = self.inputs(batch)
        labels = inputs.pop("labels")
        starts = (labels != IGNORED).int().argmax(dim=1)
        first = int(starts.min())
        question = torch.arange(labels.shape[1], device=labels.device) < starts[:, None]
        with self.remembering(question):
            logits, hidden = self._scores(inputs, labels.shape[1] - first + 1)
        return AnswerLogits(logits[:, :-1], labels[:, first:], hidden[:, :-1])

    def features(self, batch: Batch) -> Tensor:
        """Return (B, D): what enters the head at the last token of the question."""
        inputs = self.inputs(batch, padding="left", answers=False)
        with self.remembering(inputs["attention_mask"].bool()):
            return self._scores(inputs, 1)[1][:, -1]

    def _answer(self, batch: Batch, length: int, generation: dict[str, Any]) -> list[str]:
        with self.remembering():
            return super()._answer(batch, length, generation)

    def optimizers_for(self, total_steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        """The recipe of this model, modules included; see `TrainedModel`."""
        optimizer, _ = super().optimizers_for(total_steps)
        weights = [*self.remember.readers.parameters()]
        for own, decay in ((True, self.weight_decay), (False, 0.0)):
            members = [weight for weight in weights if (weight.ndim > 1) == own]
            optimizer.add_param_group({"params": members, "lr": self.lr, "weight_decay": decay})
        gates, rate = [*self.remember.gates.parameters()], self.gate_rate * self.lr
        optimizer.add_param_group({"params": gates, "lr": rate, "weight_decay": 0.0})
        return optimizer, LambdaLR(optimizer, WarmupCosine(total_steps, self.warmup))

    def fresh(self, seed: int) -> Self:
        """Build the same model with newly drawn weights and closed gates, in training mode."""
        new = super().fresh(seed)
        new.remember = self.remember.fresh(seed)
        return new

    def save_native(self, folder: Path) -> None:
        """Write network and processor as transformers would, and the modules beside them."""
        super().save_native(folder)
        self.remember.save(folder)


def load_remembering(
    folder: str | Path, dtype: Dtype = "float32", **settings: Any
) -> RememberingLM:
    """Load what `RememberingLM.save_native` wrote, in evaluation mode.

    Args:
        folder: the folder.
        dtype: of the network's weights.
        **settings: further arguments of `MultimodalLM`.

    Raises:
        MissingFileError: a file is missing.
        WeightsError: a file is damaged, or they do not fit each other.
    """
    modules = VisionRemember.load(folder)
    own = {key: value for key, value in modules.settings.items() if key not in ("width", "source")}
    model = RememberingLM(folder, dtype=dtype, **own, **settings)
    if modules.settings != model.remember.settings:
        raise WeightsError(
            f"the modules in '{folder}' were made for another network; copy the folder again"
        )
    model.remember.load_state_dict(modules.state_dict())
    return model.eval()
