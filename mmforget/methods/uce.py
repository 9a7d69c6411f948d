"""UCE: edit in closed form what the layers that read text answer to a concept."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec, check_together, contains, normalised
from mmforget.data.base import View
from mmforget.errors import (
    ConfigurationError,
    DivergenceError,
    NoOpError,
    RequestError,
    WeightsError,
    suggest,
)
from mmforget.methods.closed_form import (
    HELD_OUT,
    Embedder,
    Rows,
    Scope,
    Solution,
    Space,
    compress,
    gather,
    guide_word,
    neighbours,
    precise_dtype,
    solve,
    thinned,
    times,
)
from mmforget.methods.text_guided import ConceptMethod
from mmforget.models.base import Model, TextConditioned, TextLayer, state_hash
from mmforget.models.weight_edit import WeightEdit, base_facts

logger = logging.getLogger(__name__)

Technique = Literal["replace", "project"]
ScopeChoice = Literal["auto", "last", "last_to_end", "all", "content_to_eos"]

ESCALATION: tuple[Scope, ...] = ("last", "last_to_end", "all")
LEAK_LIMIT, WEAK = 0.2, 0.35
CHECKED_ROWS, CHECKED_LAYERS = 256, 16
HALVINGS = 10


@dataclass(frozen=True)
class Shared:
    """What all layers of one input space share: ``T = left @ right``, or the rows behind it.

    Attributes:
        left, right: (d, r) and (r, d).
        solution, rows: of which the per-layer targets of ``project`` are made.
    """

    left: Tensor
    right: Tensor
    solution: Solution
    rows: Rows

    def factors(self, weight: Tensor, technique: Technique) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, columns), whose product changes a weight (out, columns)."""
        if technique == "replace":
            return times(weight, self.left), self.right
        scale = self.rows.weight.sqrt()
        given, aim = times(weight, self.rows.erase.T), times(weight, self.rows.guide.T)
        unit = given / given.norm(dim=0).clamp(min=torch.finfo(given.dtype).tiny)
        aim = aim - unit * (unit * aim).sum(0)
        up = (aim - given) * scale.to(given)
        return compress(up, self.solution.down.to(up))


class UCE(ConceptMethod):
    r"""Unified Concept Editing: one linear solve, no training, seconds.

    Changes the layers that read text (keys and values of the cross-attention, for SDXL, SD3 and
    FLUX also the layers that read the pooled text), so that embedding rows ``c_i`` of the concept
    give what rows ``g_i`` of its anchor gave, and rows ``p_j`` of preserved words what they gave::

        Delta W = sum_i e W (g_i - c_i) (A^-1 c_i)^T
        A = lam I + e sum_i c_i c_i^T + p sum_j p_j p_j^T

    in the paper's notation ``W_new = (lam W + e (G W^T)^T C + p (P W^T)^T P) A^-1``; the two are
    equal. Written so, the edit is exactly a LoRA of a rank of at most the number of rows.

    Unlike the released code: biases stay out of the targets; the ridge is relative to the size of
    the embeddings; the begin token and the empty text are always preserved; the solve is in double
    precision, once for all layers. Several concepts are solved together. One after another, through
    `carry` and `inherit`, all of them are solved anew from the original weights, so that the order
    does not matter.

    Closed-form edits conceal a concept well, but a learned token can bring it back: use `ESD` or
    `SalUn` where that matters.

    Reads no data.

    Args:
        model, concepts, copy, seed: see `ConceptMethod`. Concepts without `preserve` get neighbours
            chosen by the model, with a warning; naming them is better.
        scope: which token positions are edited: ``last`` (the last token of the text),
            ``last_to_end`` (from the last token of the concept to the end), ``all``,
            ``content_to_eos`` (the concept's tokens and the end token). Padding that the network
            should not read, as with T5, is never edited; end tokens that pad a CLIP text are, in
            ``last_to_end`` and ``all``. ``auto`` begins with ``last`` and escalates in this order
            while the leak is above 0.2.

            The leak compares outputs of the layers for full prompts, from the concept's last token
            to the end: ``|W_new c - W g| / |W c - W g|``, root of sums over positions and layers; 0
            is fully erased, 1 untouched.
        lambda_rel: ridge ``lam`` over the mean of ``|c_i|^2``; 0 needs independent rows.
        lam: absolute ridge, as in published settings (0.5 in the released code); overrides
            `lambda_rel`.
        erase_scale: ``e``, above 0.
        preserve_scale: ``p``, 0 or more; None is ``max(0.1, 1 / m)`` for ``m`` preserved rows, as
            in the code released in 2023. (Plain ``1 / m`` is as weak as the ridge once ``m`` nears
            1000, and preserves much worse at the same leak.)
        technique: ``replace`` as above; ``project`` removes from ``W g_i`` its component along
            ``W c_i``.
        max_drift: largest relative change of the layers' outputs for preserved words in sentences
            that the solve has not seen, over all positions, in (0, 1]. While it is exceeded, ``e``
            is halved, at most 10 times. Small values weaken the erasure: with the default, a third
            of the digit world's "red" is left (`benchmarks/concept_table.py`, "UCE defaults").

    Raises:
        ConfigurationError: a value out of range.
        ModelError: quantised or off-loaded layers.

    Reference:
        R. Gandikota, H. Orgad, Y. Belinkov, J. Materzynska, D. Bau: Unified Concept Editing in
        Diffusion Models, WACV 2024, arXiv 2308.14761.
    """

    view: ClassVar[View | None] = None

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        scope: ScopeChoice = "auto",
        lambda_rel: float = 1e-3,
        lam: float | None = None,
        erase_scale: float = 1.0,
        preserve_scale: float | None = None,
        technique: Technique = "replace",
        max_drift: float = 0.2,
    ) -> None:
        if isinstance(model, TextConditioned):  # if not, the base class says so
            model.text_layers()  # refuses offloaded weights before they are copied or hashed
        super().__init__(model, concepts, copy=copy, seed=seed)
        for name, value, valid in (
            ("scope", scope, get_args(ScopeChoice)),
            ("technique", technique, get_args(Technique)),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        for name, number in (("lambda_rel", lambda_rel), ("lam", lam)):
            if number is not None and not 0 <= number < math.inf:
                raise ConfigurationError(f"`{name}` is {number}, it must be above 0, such as 1e-3")
        if not 0 < erase_scale < math.inf:
            raise ConfigurationError(f"`erase_scale` is {erase_scale}, it must be above 0")
        if preserve_scale is not None and not 0 <= preserve_scale < math.inf:
            raise ConfigurationError(f"`preserve_scale` is {preserve_scale}, it must be 0 or more")
        if not 0 < max_drift <= 1:
            raise ConfigurationError(f"`max_drift` is {max_drift}, it must lie between 0 and 1")
        self.scope, self.lambda_rel, self.lam = scope, lambda_rel, lam
        self.erase_scale, self.preserve_scale = erase_scale, preserve_scale
        self.technique, self.max_drift = technique, max_drift
        self.layers: list[TextLayer] = self.model.text_layers()
        self._original: dict[str, Tensor] = {}
        self._base_hash = ""
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows: dict[Space, Rows] = {}
        self._report: dict[str, Any] = {}

    # ---- state that travels along a sequence of requests ----------------------------------------

    def carry(self) -> dict[str, Tensor]:
        """Original weights of the layers, and all concepts so far."""
        facts = {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "base_hash": self._base_hash,
        }
        text = json.dumps(facts, ensure_ascii=False).encode()
        named = {f"original.{name}": weight for name, weight in self._original.items()}
        return {**named, "facts": torch.tensor(list(text), dtype=torch.uint8)}

    def inherit(self, state: dict[str, Tensor]) -> None:
        """Erase the earlier concepts too, all from the original weights.

        A word that an earlier request preserved may be erased now; it is preserved no longer.

        Raises:
            RequestError: the requests contradict each other.
        """
        if not state:
            return
        facts = json.loads(bytes(state["facts"].tolist()).decode())
        earlier = tuple(ConceptSpec.from_dict(concept) for concept in facts["concepts"])
        together = (*earlier, *self.concepts)
        erased = {normalised(word) for concept in together for word in concept.words}
        self.concepts = tuple(
            replace(c, preserve=tuple(w for w in c.preserve if normalised(w) not in erased))
            for c in together
        )
        check_together(self.concepts)
        prefix = "original."
        self._original = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if set(self._original) != {layer.name for layer in self.layers}:
            raise WeightsError(
                "the state of the previous request belongs to another model; its text layers differ"
            )
        self._base_hash = facts["base_hash"]

    # ---- the edit -------------------------------------------------------------------------------

    @torch.no_grad()
    def edit(self) -> None:
        """Solve and change the weights.

        Raises:
            NoOpError: every erased row is also preserved.
            DivergenceError: weights that are not finite in the model's precision.
        """
        if not self._original:
            self._base_hash = state_hash(self.model.network)
            self._original = {
                layer.name: layer.module.weight.detach().clone() for layer in self.layers
            }
        start = time.perf_counter()
        embedder = Embedder(self.model)
        self.concepts, chosen = with_neighbours(embedder, self.concepts)
        shared = self.found(embedder)
        self.install(shared)
        self._report |= {
            "preserved_by_default": chosen,
            "technique": self.technique,
            "layers": len(self.layers),
            "rank": max(up.shape[1] for up, _ in self._factors.values()),
            "residual": max(part.solution.residual for part in shared.values()),
            "rows": {
                space: {"erased": len(part.rows.erase), "preserved": len(part.rows.keep)}
                for space, part in shared.items()
            },
            "seconds": time.perf_counter() - start,
        }

    def install(self, shared: Mapping[Space, Shared]) -> None:
        """Bring an edit into the weights, in place of any earlier one."""
        stored: dict[int, Tensor] = {}  # one tensor for all layers that share a factor
        for layer in self.layers:
            up, down = shared[layer.reads].factors(self.original(layer), self.technique)
            single = stored.setdefault(id(down), down.float())
            self._factors[layer.name] = up.float(), single
            self._write(layer)

    def found(self, embedder: Embedder) -> dict[Space, Shared]:
        """Choose the scope, then the erasing strength, and return the edit of each input space."""
        scopes = ESCALATION if self.scope == "auto" else (cast(Scope, self.scope),)
        leaks = {}
        for scope in scopes:
            rows = self.rows(embedder, scope)
            shared = self.solved(rows, self.erase_scale)
            leaks[scope] = self.leak(embedder, shared)
            if leaks[scope] <= LEAK_LIMIT:
                break
        scale, held_out = self.erase_scale, self.held_out(embedder)
        drift = self.drift(held_out, shared)
        for _ in range(HALVINGS):
            if drift <= self.max_drift:
                break
            scale /= 2
            shared = self.solved(rows, scale)
            drift = self.drift(held_out, shared)
        if drift > self.max_drift:
            logger.warning(
                "%s: preserved words drift by %.3f, above max_drift=%g even with erase_scale=%.2g; "
                "they resemble the concept too much, or `lambda_rel` is too small",
                type(self).__name__,
                drift,
                self.max_drift,
                scale,
            )
        leak = self.leak(embedder, shared)
        if leak > WEAK:
            logger.warning(
                "%s: the edit is weak, %.2f of the concept is left in the layers' outputs "
                "(erase_scale=%.2g); raise `max_drift` (now %g), or preserve fewer words that "
                "resemble the concept",
                type(self).__name__,
                leak,
                scale,
                self.max_drift,
            )
        self._rows = rows
        self._report |= {
            "scope": scope,
            "leak_by_scope": leaks,
            "leak": leak,
            "drift": drift,
            "erase_scale": scale,
        }
        return shared

    def rows(self, embedder: Embedder, scope: Scope) -> dict[Space, Rows]:
        """Rows of those input spaces that a layer reads.

        Raises:
            NoOpError: nothing to erase.
        """
        spaces = {layer.reads for layer in self.layers}
        rows = {
            space: part for space, part in gather(embedder, self.concepts, scope).items()
            if space in spaces
        }  # fmt: skip
        if not any(len(part.erase) for part in rows.values()):
            raise NoOpError(
                f"{type(self).__name__} would change nothing: to the text encoder, every erased "
                "text equals a preserved one"
            )
        return rows

    def solved(
        self,
        rows: Mapping[Space, Rows],
        scale: float,
        like: Mapping[Space, Rows] | None = None,
    ) -> dict[Space, Shared]:
        """Solve each input space with an erasing strength.

        Args:
            rows: of each space.
            scale: ``e``.
            like: the rows whose size sets the ridge, if not `rows`.
        """
        shared = {}
        for space, part in rows.items():
            sized = (like or rows)[space].erase
            size = float(sized.square().sum(1).mean()) if len(sized) else 1.0
            lam = self.lambda_rel * size if self.lam is None else self.lam
            keep = self.preserve_scale
            if keep is None:
                keep = max(0.1, 1 / max(1, len(part.keep)))
            weight = scale * part.weight
            solution = solve(part.erase, part.guide, part.keep, lam, weight, keep)
            left, right = solution.compressed()
            shared[space] = Shared(left, right, solution, replace(part, weight=weight))
        return shared

    def original(self, layer: TextLayer) -> Tensor:
        """The text columns (out, columns) of a layer's weight before any edit."""
        return self._original[layer.name].to(layer.module.weight.device)[:, : layer.columns]

    def _write(self, layer: TextLayer) -> None:
        up, down = self._factors[layer.name]
        weight = layer.module.weight
        precise = precise_dtype(weight.device)
        new = self._original[layer.name].to(weight.device, precise).clone()
        new[:, : layer.columns] += up.to(precise) @ down.to(precise)
        cast_back = new.to(weight.dtype)
        if not torch.isfinite(cast_back).all():
            raise DivergenceError(
                f"{type(self).__name__} ended with non-finite values in '{layer.name}'; raise "
                "`lambda_rel` or lower `erase_scale`"
            )
        weight.copy_(cast_back)

    # ---- checks ---------------------------------------------------------------------------------

    def checked_layers(self) -> list[TextLayer]:
        """At most 16 layers that read states, evenly spaced, and all that read the pooled text."""
        states = [layer for layer in self.layers if layer.reads == "states"]
        step = max(1, math.ceil(len(states) / CHECKED_LAYERS))
        return [*states[::step], *(layer for layer in self.layers if layer.reads == "pooled")]

    def leak(self, embedder: Embedder, shared: Mapping[Space, Shared]) -> float:
        """How much of the concept is left in the outputs for full prompts, see `scope`."""
        mine, theirs = [], []
        for concept in self.concepts:
            for sentence in concept.sentences:
                for word in concept.words:
                    one, other = embedder.pairs(sentence, word, guide_word(concept), "last_to_end")
                    mine.append(one)
                    theirs.append(other)
        erase = thinned(torch.cat(mine), CHECKED_ROWS)
        guide = thinned(torch.cat(theirs), CHECKED_ROWS)
        left, before = 0.0, 0.0
        for layer in self.checked_layers():
            if layer.reads == "pooled":
                continue
            weight = self.original(layer)
            up, down = shared["states"].factors(weight, self.technique)
            gap = times(weight, (erase - guide).T)
            left += float((gap + up @ (down.to(up) @ erase.T.to(up))).square().sum())
            before += float(gap.square().sum())
        return math.sqrt(left / before) if before else 0.0

    def held_out(self, embedder: Embedder) -> dict[Space, Tensor]:
        """Rows of preserved words in sentences that do not enter the solve."""
        states, pooled = [], []
        words = dict.fromkeys(word for concept in self.concepts for word in concept.preserve)
        for word in words:
            for sentence in HELD_OUT:
                if not fits(embedder.model, sentence.format(word)):
                    continue
                states.append(embedder.kept(sentence, word, "last_to_end"))
                one = embedder.pooled(sentence.format(word))
                if one is not None:
                    pooled.append(one)
        found: dict[Space, Tensor] = {}
        if states:
            found["states"] = thinned(torch.cat(states), CHECKED_ROWS)
        if pooled:
            found["pooled"] = thinned(torch.stack(pooled), CHECKED_ROWS)
        return found

    def drift(self, held_out: Mapping[Space, Tensor], shared: Mapping[Space, Shared]) -> float:
        """Relative change of the layers' outputs: the larger of states and pooled text."""
        moved = dict.fromkeys(held_out, 0.0)
        size = dict.fromkeys(held_out, 0.0)
        for layer in self.checked_layers():
            if layer.reads not in held_out:
                continue
            weight, rows = self.original(layer), held_out[layer.reads]
            up, down = shared[layer.reads].factors(weight, self.technique)
            moved[layer.reads] += float((up @ (down.to(up) @ rows.T.to(up))).square().sum())
            size[layer.reads] += float(times(weight, rows.T).square().sum())
        return max((math.sqrt(moved[s] / size[s]) for s in held_out if size[s]), default=0.0)

    # ---- results --------------------------------------------------------------------------------

    def weight_edit(self) -> WeightEdit:
        """The change relative to the original weights, of all concepts so far; after `finalize`.

        Raises:
            ConfigurationError: the edit has not been made yet.
        """
        if not self._factors:
            raise ConfigurationError(
                f"{type(self).__name__} has no edit yet; call `method.finalize()` first"
            )
        narrow = {
            layer.name: layer.module.in_features
            for layer in self.layers
            if layer.columns < layer.module.in_features
        }
        metadata = {
            **base_facts(self.model, self._base_hash),
            "method": type(self).__name__,
            "seed": self.seed,
            "widths": narrow,
            "settings": self.settings(),
            **self.statistics(),
        }
        on_cpu = {id(down): down.cpu() for _, down in self._factors.values()}
        factors = {name: (up.cpu(), on_cpu[id(down)]) for name, (up, down) in self._factors.items()}
        return WeightEdit(self.model.component, factors, {}, metadata)

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the edit."""
        return {
            "scope": self.scope,
            "lambda_rel": self.lambda_rel,
            "lam": self.lam,
            "erase_scale": self.erase_scale,
            "preserve_scale": self.preserve_scale,
            "technique": self.technique,
            "max_drift": self.max_drift,
        }

    def statistics(self) -> dict[str, Any]:
        """Concepts, and after `finalize` scope, leak, drift, strength, rank, residual, seconds."""
        return {**super().statistics(), **self._report}

    def save_adapter(self, folder: Path) -> None:
        """Write the edit and, for diffusers, the same as a LoRA."""
        edit = self.weight_edit()
        edit.save(folder)
        edit.save_lora(folder)

    def restore(self) -> Model:
        """Give back the model that the method received; exact also after an edit in place."""
        if self.copied:
            return super().restore()
        for layer in self.layers:
            if layer.name in self._original:
                layer.module.weight.data.copy_(self._original[layer.name])
        return cast(Model, self.model)


def with_neighbours(
    embedder: Embedder, concepts: Sequence[ConceptSpec]
) -> tuple[tuple[ConceptSpec, ...], list[str]]:
    """Give concepts without preserved words some, and say which.

    Returns:
        The concepts, and the words that were added.
    """
    erased = [normalised(word) for concept in concepts for word in concept.words]
    full: list[ConceptSpec] = []
    added: list[str] = []
    for concept in concepts:
        if concept.preserve or any(other.preserve for other in concepts):
            full.append(concept)
            continue

        def unfit(word: str, concept: ConceptSpec = concept) -> bool:
            plain = normalised(word)
            clash = any(contains(plain, one) or contains(one, plain) for one in erased)
            return clash or not fits(embedder.model, *concept.prompts(word))

        words = neighbours(embedder, concept, unfit)
        logger.warning(
            "'%s' has no `preserve`; without it other concepts suffer, so these neighbours are "
            "preserved: %s. Naming your own is better",
            concept.target,
            ", ".join(words),
        )
        full.append(replace(concept, preserve=words))
        added += words
    return tuple(full), added


def fits(model: Any, *prompts: str) -> bool:
    """Whether the text encoders read all of these prompts in full."""
    try:
        model.check_length(prompts)
    except RequestError:
        return False
    return True
