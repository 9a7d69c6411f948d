"""Vision Remember: visual tokens read the tower's features again between the decoder layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, MissingFileError, WeightsError
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import unwrapped
from mmforget.models.weights import put_weights, read_weights, write_weights
from mmforget.retention.region_reader import RegionReader, region_index
from mmforget.retention.tower_tap import PassPictures, TowerTap, no_grid
from mmforget.seeds import derive

WEIGHTS_FILE = "vision_remember.safetensors"
SETTINGS_FILE = "vision_remember.json"

_ATTACHED: set[tuple[int, int]] = set()
"""Modules and networks, by identity, that are joined at present."""


class VisionRemember(nn.Module):
    r"""Modules that refresh visual tokens between decoder layers from the tower's own features.

    A projector that compresses gives the language model few visual tokens, and these lose detail
    from layer to layer. After each of some layers, the hidden states X of the visual tokens become

    .. math:: X + \tanh(\gamma) \, R(X, F)

    with R a `RegionReader`, F the outputs of some blocks of the tower side by side, and
    :math:`\gamma` a learnt number per layer that starts at 0, so that the network starts as it was.

    No code of the authors is public, and their formula of the saliency, the layers and the schedule
    are not known to us. Ours are: the formulas of `RegionReader`, the gate, the default layers
    (T // 8, T // 4 and T // 2 of T), one set of weights per layer, the training recipe. From the
    papers: several levels of the tower, attention to a local region with saliency (first version),
    and attention among the visual tokens in both directions, guided by the text (second version,
    `text_guided`).

    Nothing of the network is replaced: while `attached`, hooks listen to the tower and change the
    output of the layers at the places of visual tokens, nowhere else. At decoding steps nothing is
    done, since the keys and values of the visual tokens are cached already. Rows without picture
    are not touched. The tower is not trained through this path.

    Args:
        after: decoder layers, from 0, whose output is refreshed.
        levels: blocks of the tower whose outputs are read, from 0.
        width: of the language model.
        source: of the tower.
        inner: width of the attention; a multiple of `heads`.
        heads: of the attention.
        window: side of the region of a token, in patches of the tower.
        saliency, text_guided: see `RegionReader`.
        share: one set of weights for all layers; the gates remain their own.
        seed: of the weights.

    Raises:
        ConfigurationError: a value out of range.

    Reference:
        Feng et al., Vision Remember: Alleviating visual forgetting in efficient MLLM with vision
        feature resample, 2025, arXiv 2506.03928.
    """

    def __init__(
        self,
        after: Sequence[int],
        levels: Sequence[int],
        width: int,
        source: int,
        inner: int,
        heads: int = 4,
        window: int = 2,
        saliency: bool = True,
        text_guided: bool = False,
        share: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("after", after), ("levels", levels)):
            if not value or min(value) < 0 or len(set(value)) < len(value):
                raise ConfigurationError(
                    f"`{name}` is {list(value)}; name different layers, counted from 0"
                )
        self.after, self.levels = tuple(sorted(after)), tuple(sorted(levels))
        self.share, self.text_guided = share, text_guided
        self.settings: dict[str, Any] = {
            "after": list(self.after),
            "levels": list(self.levels),
            "width": width,
            "source": source,
            "inner": inner,
            "heads": heads,
            "window": window,
            "saliency": saliency,
            "text_guided": text_guided,
            "share": share,
        }
        self._arguments = (width, source * len(levels), inner, heads, window, saliency, text_guided)
        names = ["all"] if share else [str(layer) for layer in self.after]
        self.window = window
        self.readers = nn.ModuleDict({name: self._built(seed, name) for name in names})
        self.gates = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.zeros(())) for layer in self.after}
        )

    def _built(self, seed: int, name: str) -> RegionReader:
        with torch.random.fork_rng(devices=[]):  # modules are built on the CPU
            torch.default_generator.manual_seed(derive(seed, "vision_remember", name))
            return RegionReader(*self._arguments)

    @classmethod
    def for_model(
        cls,
        model: MultimodalLM,
        after: Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        inner: int | None = None,
        heads: int = 4,
        window: int | None = None,
        saliency: bool = True,
        text_guided: bool = False,
        share: bool = False,
        seed: int = 0,
    ) -> Self:
        """Build modules that fit a model.

        Args:
            model: the model; one picture goes through its tower to see what its projector does.
            after: None takes layers T // 8, T // 4 and T // 2 of T.
            levels: None takes those at 13/23, 18/23 and 23/23 of the tower's depth.
            inner: None takes a quarter of the width, rounded up to a multiple of `heads`.
            heads: see the class.
            window: None takes the patches per visual token along a side, or 3 where the projector
                keeps all patches.
            saliency: see the class.
            text_guided: see the class.
            share: see the class.
            seed: see the class.

        Raises:
            CapabilityError: the projector's tokens form no grid.
            ConfigurationError: a layer that the network does not have; see also the class.
        """
        network, family = unwrapped(model.network), model.family
        depth, blocks = len(family.layers(network)), len(family.vision_blocks(network))
        if after is None:
            after = sorted({depth // 8, depth // 4, depth // 2})
        if levels is None:
            levels = sorted({int((blocks - 1) * part / 23 + 0.5) for part in (13, 18, 23)})
        for name, value, most in (("after", after, depth), ("levels", levels, blocks)):
            if value and max(value) >= most:
                raise ConfigurationError(
                    f"`{name}` is {list(value)}, but there are {most} layers, counted from 0"
                )
        source, patches = _probed(model, levels[0])
        width = model.num_features
        if inner is None:
            inner = -(-width // (4 * heads)) * heads
        return cls(
            after,
            levels,
            width,
            source,
            inner,
            heads,
            (patches if patches > 1 else 3) if window is None else window,
            saliency,
            text_guided,
            share,
            seed,
        ).to(model.device)

    def fresh(self, seed: int) -> Self:
        """The same modules with newly drawn weights, closed gates, on the same device."""
        new = type(self)(**self.settings, seed=seed)
        return new.to(next(self.parameters()).device)

    @contextmanager
    def attached(self, network: Any, prompt: Tensor | None = None) -> Iterator[Self]:
        """Refresh the visual tokens of a network while the context is open.

        A second opening for the same network does nothing.

        Args:
            network: of transformers, also wrapped by peft.
            prompt: (B, L) bool: the tokens of the question, for `text_guided`. None is right for
                generation, where everything that is read first is the question; where a loss is
                computed the answer would guide its own prediction.
        """
        base = unwrapped(network)
        pair = (id(self), id(base))
        if pair in _ATTACHED:
            yield self
            return
        _ATTACHED.add(pair)
        tap = TowerTap(base, self.after, self.levels, self.refreshed, self.text_guided, prompt)
        try:
            tap.install()
            yield self
        finally:
            tap.remove()
            _ATTACHED.discard(pair)

    def refreshed(self, layer: int, states: Tensor, pictures: PassPictures) -> Tensor:
        """The output of a decoder layer (B, L, D) with its visual tokens refreshed."""
        reader = self.readers["all" if self.share else str(layer)]
        gate = self.gates[str(layer)].tanh()
        guide = pictures.guide(states) if self.text_guided else None
        tokens = states[pictures.visual].split([h * w for h, w in pictures.grids])
        added: list[Tensor] = [states] * len(tokens)
        for shape in dict.fromkeys(pictures.shapes):
            same = [n for n, other in enumerate(pictures.shapes) if other == shape]
            index = region_index(*shape, self.window).to(states.device)
            own = torch.stack([tokens[n] for n in same])
            features = torch.stack([pictures.features[n] for n in same])
            guides = None if guide is None else guide[[pictures.rows[n] for n in same]]
            dtype = next(reader.parameters()).dtype
            found = reader(
                own.to(dtype),
                features.to(dtype),
                index,
                None if guides is None else guides.to(dtype),
            )
            for n, one in zip(same, found, strict=True):
                added[n] = one
        change = (gate * torch.cat(added)).to(states.dtype)
        return states.masked_scatter(pictures.visual[..., None], torch.cat(tokens) + change)

    # ---- files ----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write weights and settings into an existing folder."""
        folder = Path(folder)
        write_weights(self, folder / WEIGHTS_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MissingFileError: a file is missing.
            WeightsError: a file is damaged, or they do not fit each other.
        """
        about = Path(folder) / SETTINGS_FILE
        if not about.is_file():
            raise MissingFileError(
                f"'{folder}' has no {SETTINGS_FILE}; give a folder that holds Vision Remember, or "
                "load the model alone with `load_multimodal`"
            )
        try:
            new = cls(**json.loads(about.read_text()))
        except (ValueError, TypeError) as error:
            raise WeightsError(f"'{about}' is damaged ({error}); copy it again") from error
        put_weights(new, read_weights(Path(folder) / WEIGHTS_FILE), Path(folder) / WEIGHTS_FILE)
        return new


def _probed(model: MultimodalLM, level: int) -> tuple[int, int]:
    """Width of the tower, and patches per visual token along a side."""
    network = unwrapped(model.network)
    # large enough for every processor, with a pattern, since some skip black pictures
    picture = (torch.arange(3 * 56 * 56) % 255).reshape(3, 56, 56).to(torch.uint8)
    asked = {"images": [[picture]], "question": ["?"]}
    inputs = model.inputs(asked, padding="left", answers=False)
    with torch.no_grad():
        found = model.family.encode_images(network, inputs, [level])
    if found.grid[0] is None:
        raise no_grid(len(found.pooled[0]), found.raw_grid[0])
    return found.levels[level][0].shape[-1], max(1, found.raw_grid[0][0] // found.grid[0][0])
