"""Hooks that hand the outputs of the vision tower's blocks to the decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.models.multimodals.base import MultimodalFamily, family_of


def no_grid(tokens: int, raw: tuple[int, int]) -> CapabilityError:
    """The error for visual tokens that have no place in the picture."""
    return CapabilityError(
        f"{tokens} visual tokens of a picture of {raw[0]}x{raw[1]} patches form no grid, so that "
        "Vision Remember finds no region for them; use a projector that keeps the grid"
    )


@dataclass
class PassPictures:
    """The pictures of one forward pass.

    Attributes:
        visual: (B, L) bool.
        words: (B, L) bool: the text of the questions.
        features: per picture (M, C).
        shapes: per picture the grid of its tokens and that of its features.
        rows: per picture its row.
    """

    visual: Tensor
    words: Tensor
    features: list[Tensor] = field(default_factory=list)
    shapes: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Per picture (h, w) of its visual tokens."""
        return [grid for grid, _ in self.shapes]

    def guide(self, states: Tensor) -> Tensor:
        """(B, D) mean of the hidden states of the text."""
        words = self.words[..., None].to(states.dtype)
        mean: Tensor = (states * words).sum(dim=1) / words.sum(dim=1).clamp(min=1)
        return mean


class TowerTap:
    """The hooks on one network, and what they have seen.

    A forward pass is known by the tensor of its rotary positions, which all layers are handed: so
    a layer that gradient checkpointing runs once more finds the pictures of its own pass.

    Args:
        network: of transformers, not wrapped.
        after: decoder layers whose output is changed.
        levels: blocks of the tower whose outputs are kept.
        change: gets the number of a layer, its output (B, L, D) and the pictures of the pass, and
            returns the new output. Passes without pictures do not come here.
        guided: whether `change` asks for the question's hidden states.
        prompt: (B, L) bool: the tokens of the question, or None if all that is read with a picture
            is the question.
    """

    def __init__(
        self,
        network: Any,
        after: Sequence[int],
        levels: Sequence[int],
        change: Callable[[int, Tensor, PassPictures], Tensor],
        guided: bool,
        prompt: Tensor | None,
    ) -> None:
        self.network, self.after, self.levels = network, after, levels
        self.change, self.guided, self.prompt = change, guided, prompt
        self.family: MultimodalFamily = family_of(network)
        self.states: dict[int, Tensor] = {}
        self.seen: dict[str, Any] = {}
        self.output: Any = None
        self.projected = 0
        self.begun: dict[str, Any] = {}
        self.passes: Any = WeakTensorKeyDictionary()
        self.handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on.

        Raises:
            ConfigurationError: the network lacks one of the layers.
        """
        layers = self.family.layers(self.network)
        blocks = self.family.vision_blocks(self.network)
        for name, value, most in (
            ("after", self.after, len(layers)),
            ("levels", self.levels, len(blocks)),
        ):
            if max(value) >= most:
                raise ConfigurationError(
                    f"`{name}` is {list(value)}, but this network has {most} layers there"
                )
        tower = self.family.vision_tower(self.network)
        self.handles = [
            tower.register_forward_pre_hook(self._tower_begins, with_kwargs=True),
            tower.register_forward_hook(self._tower_ends),
            self.family.projector_of(self.network).register_forward_hook(self._projects),
            self.network.model.register_forward_pre_hook(self._begins, with_kwargs=True),
            layers[0].register_forward_pre_hook(self._layers_begin, with_kwargs=True),
            *(blocks[n].register_forward_hook(self._keep(n)) for n in self.levels),
            *(
                layers[n].register_forward_hook(self._refresh(n), with_kwargs=True)
                for n in self.after
            ),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    # ---- the tower ------------------------------------------------------------------------------

    def _tower_begins(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        if pixels is None:  # Qwen names it otherwise
            pixels = kwargs.get("hidden_states")
        grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        self.seen = {"pixel_values": pixels, "image_grid_thw": grids}
        self.states = {}

    def _tower_ends(self, _module: Any, _args: Any, output: Any) -> None:
        self.output = output

    def _projects(self, _module: Any, _args: Any, output: Tensor) -> None:
        self.projected = output.numel() // output.shape[-1]

    def _keep(self, number: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self.states[number] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    # ---- the language model ---------------------------------------------------------------------

    def _begins(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begun = {"input_ids": args[0] if args else None} | kwargs

    def _layers_begin(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        place = kwargs["position_embeddings"][0]
        if place not in self.passes:  # else the layer runs once more
            # a list, since None would say that the pass is not known
            self.passes[place] = [self._pictures()]

    def _refresh(self, number: int) -> Any:
        def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            found = self.passes.get(kwargs["position_embeddings"][0])
            states = output[0] if isinstance(output, tuple) else output
            pictures = None if found is None else found[0]
            if found is None or (pictures and states.shape[:2] != pictures.visual.shape):
                raise ConfigurationError(
                    f"decoder layer {number} does not see the tokens that the first layer saw, so "
                    "Vision Remember cannot tell which are visual; prune after its last layer only"
                )
            if pictures is None:
                return None
            changed = self.change(number, states, pictures)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _pictures(self) -> PassPictures | None:
        """The pictures of the pass that begins, None if it has none."""
        ids = self.begun.get("input_ids")
        if ids is None:
            raise ConfigurationError(
                "Vision Remember needs `input_ids` to find the visual tokens, but the network was "
                "given embeddings"
            )
        visual = self.family.visual_mask(self.network, ids)
        if not visual.any() or not self._shows_pictures():
            return None
        raw = self.family.raw_grids(self.network, self.seen, len(self.states[self.levels[0]]))
        patches = sum(h * w for h, w in raw)
        counts = [h * w * self.projected // patches for h, w in raw]
        copies = max(1, int(visual.sum()) // max(1, self.projected))  # of a row, one per beam
        grids = []
        for count, size in zip(counts, raw, strict=True):
            grid = self.family.grid_of(self.network, count, size)
            if grid is None or grid[0] * grid[1] != count:
                raise no_grid(count, size)
            grids.append(grid)
        once = {"input_ids": ids[::copies]}
        numbers = self.family.pictures_per_row(self.network, once, counts)
        levels = [self.family.split_states(self.network, self.states[n], raw) for n in self.levels]
        features = [torch.cat(parts, dim=-1) for parts in zip(*levels, strict=True)]
        found, first = PassPictures(visual, self._words(visual)), 0
        for row, number in enumerate(numbers):
            for copy in range(copies):
                for picture in range(first, first + number):
                    found.features.append(features[picture])
                    found.shapes.append((grids[picture], raw[picture]))
                    found.rows.append(row * copies + copy)
            first += number
        return found

    def _shows_pictures(self) -> bool:
        """Whether the pass shows pictures, which must be those that the tower saw last.

        A network may also say a placeholder; then there is no picture behind it.
        """
        given = self.begun.get("mm_encoder_outputs") or {}
        image = given.get("image") if isinstance(given, dict) else given
        if self.begun.get("pixel_values") is None and image is None:
            return False
        own = image is None or (
            self.output is not None
            and getattr(image, "last_hidden_state", None)
            is getattr(self.output, "last_hidden_state", self.output)
        )
        if not self.states or not own:
            raise ConfigurationError(
                "Vision Remember reads the features of the network's own tower, but the visual "
                "tokens come from elsewhere; give `pixel_values`, and spare no tokens before the "
                "layers"
            )
        return True

    def _words(self, visual: Tensor) -> Tensor:
        """(B, L) bool: the text of the questions."""
        mask = self.begun.get("attention_mask")
        known = torch.ones_like(visual)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            known = mask[:, -visual.shape[1] :].bool()
        if not self.guided:
            return known
        if self.prompt is not None:
            known = known & self.prompt.to(known.device)
        elif not self.begun.get("use_cache"):
            raise ConfigurationError(
                "Vision Remember with `text_guided` must know which tokens are the question, or "
                "the answer guides its own prediction; use `RememberingLM`, or give `prompt`"
            )
        return known & ~visual
