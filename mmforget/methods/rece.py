"""RECE: UCE, then the embeddings that would bring the concept back, erased too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.closed_form import (
    Embedder,
    Rows,
    Space,
    gather,
    precise_dtype,
    times,
)
from mmforget.methods.uce import HALVINGS, UCE, ScopeChoice, Shared
from mmforget.models.base import Model

logger = logging.getLogger(__name__)

Form = Literal["zero", "standard", "surrogate"]

DEFAULTS: Mapping[str, tuple[int, float]] = {"unsafe": (3, 1e-1), "style": (1, 1e-3)}
"""Epochs and `reg` by kind, as published; other kinds take 1 and 1e-1."""


class RECE(UCE):
    r"""Reliable and Efficient Concept Erasure: UCE with derived adversarial embeddings.

    After UCE, other embeddings may still make the layers say what the concept made them say. For
    layers ``W_i`` (edited) and ``W_i*`` (original), the nearest such embedding to a row ``c`` is::

        c_adv = (reg I + sum_i W_i^T W_i)^-1 (sum_i W_i^T W_i*) c

    In every epoch, these are derived for all rows of the concept's prompts. Unlike the released
    code, which edits the edited weights once more with the derived rows alone, we solve for given
    and derived rows together from the original weights: the second edit would move the given rows
    again, beyond their anchor. Of the layers only ``sum_i W_i*^T W_i*`` is needed to derive, since
    all edits have the form ``W* (I + T)``.

    Reads no data. Changes what `UCE` changes; the result is a LoRA too.

    Args:
        model, concepts, copy, seed, scope, lambda_rel, lam, erase_scale, preserve_scale, max_drift:
            see `UCE`. `scope` is that of the first edit; derived rows are taken at all positions.
        epochs: derivations, 0 or more; 0 is UCE. None takes 3 for unsafe, else 1, as published.
        reg: ``reg``, above 0, in units of the weights as published. None takes 1e-3 for styles,
            else 1e-1; 1e-3 for objects that resist.
        form: ``zero`` as above; ``standard`` draws towards ``c`` by adding ``reg c`` on the right;
            ``surrogate`` puts ``sum_i W_i^T W_i`` in the place of ``I``.
        score_fn: called with the pipeline, returns how visible the concept still is. An epoch that
            does not lower it is undone and ends the search. None runs all epochs.

    Raises:
        ConfigurationError: a value out of range.

    Reference:
        C. Gong, K. Chen, Z. Wei, J. Chen, Y.-G. Jiang: Reliable and Efficient Concept Erasure of
        Text-to-Image Diffusion Models, ECCV 2024, arXiv 2407.12383.
    """

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
        max_drift: float = 0.2,
        epochs: int | None = None,
        reg: float | None = None,
        form: Form = "zero",
        score_fn: Callable[[Any], float] | None = None,
    ) -> None:
        super().__init__(
            model,
            concepts,
            copy=copy,
            seed=seed,
            scope=scope,
            lambda_rel=lambda_rel,
            lam=lam,
            erase_scale=erase_scale,
            preserve_scale=preserve_scale,
            max_drift=max_drift,
        )
        usual = DEFAULTS.get(self.concepts[0].kind, (1, 1e-1))
        self.epochs = usual[0] if epochs is None else epochs
        self.reg = usual[1] if reg is None else reg
        if self.epochs < 0:
            raise ConfigurationError(f"`epochs` is {epochs}, it must be 0 or more")
        if not self.reg > 0:
            raise ConfigurationError(f"`reg` is {reg}, it must be above 0")
        if form not in get_args(Form):
            raise ConfigurationError(f"`form` is '{form}', {suggest(form, get_args(Form))}")
        self.form, self.score_fn = form, score_fn

    def found(self, embedder: Embedder) -> dict[Space, Shared]:
        """UCE's edit, then one derivation and edit per epoch."""
        shared = super().found(embedder)
        given = self._rows
        seeds = {
            space: part
            for space, part in gather(embedder, self.concepts, "all").items()
            if space in shared and len(part.erase)
        }
        grams = {space: self.gram(space) for space in seeds}
        held_out = self.held_out(embedder)
        scale, drift = float(self._report["erase_scale"]), float(self._report["drift"])
        limit = max(self.max_drift, drift)
        scores = [self.score(shared)] if self.score_fn is not None and self.epochs else []
        recreated: list[float] = []
        rows = dict(given)
        for _ in range(self.epochs):
            derived, shares = {}, []
            for space, part in seeds.items():
                derived[space], share = self.derive(part, grams[space], shared[space])
                shares.append(share)
            # Halved by itself: with the strength of the given rows, the concept would come back.
            for halving in range(HALVINGS + 1):
                wider = {
                    space: joined_rows(part, derived[space], 0.5**halving)
                    if space in derived
                    else part
                    for space, part in rows.items()
                }
                candidate = self.solved(wider, scale, like=given)
                moved = self.drift(held_out, candidate)
                if moved <= limit:
                    break
            else:
                logger.warning(
                    "RECE: an epoch would move preserved words by %.3f, above max_drift=%g, and "
                    "was left out; raise `reg` or `max_drift`",
                    moved,
                    self.max_drift,
                )
                break
            if scores:
                score = self.score(candidate)
                if score >= min(scores):
                    logger.info("RECE: an epoch did not lower the score (%.3g); undone", score)
                    break
                scores.append(score)
            shared, rows, drift = candidate, wider, moved
            recreated.append(max(shares))
        self._report |= {
            "epochs": len(recreated),
            "recreated": recreated,
            "scores": scores,
            "drift": drift,
            "leak": self.leak(embedder, shared),
        }
        return shared

    def gram(self, space: Space) -> Tensor:
        """``sum_i W_i*^T W_i*`` over the layers that read a space, (d, d)."""
        total: Tensor | None = None
        for layer in self.layers:
            if layer.reads == space:
                weight = self.original(layer)
                term = times(weight.T, weight).to(precise_dtype(weight.device))
                total = term if total is None else total + term
        assert total is not None
        return total

    def derive(self, rows: Rows, gram: Tensor, shared: Shared) -> tuple[Rows, float]:
        """Rows that make the edited layers say what the erased rows made the original ones say.

        Args:
            rows: of the concept.
            gram: see `gram`.
            shared: the edit so far.

        Returns:
            The rows with the derived ones to be erased, and how far these miss their goal:
            ``|W c_adv - W* c| / |W c - W* c|`` over all layers; below 1 the concept comes back.
        """
        edited = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        edited += shared.left.to(gram) @ shared.right.to(gram)
        now, cross = edited.T @ gram @ edited, edited.T @ gram
        goal = cross @ rows.erase.T
        ridge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if self.form == "standard":
            goal = goal + self.reg * rows.erase.T
        if self.form == "surrogate":
            # An edit can make the sum singular, hence the trace of a ridge.
            ridge = now + 1e-6 * now.diagonal().mean() * ridge
        found = torch.linalg.solve(self.reg * ridge + now, goal).T

        def miss(inputs: Tensor) -> Tensor:
            gap = inputs @ edited.T - rows.erase
            return ((gap @ gram) * gap).sum().clamp(min=0).sqrt()

        before = miss(rows.erase)
        share = float(miss(found) / before) if before > 0 else 0.0
        return replace(rows, erase=found), share

    def score(self, shared: Mapping[Space, Shared]) -> float:
        """What `score_fn` says about an edit."""
        assert self.score_fn is not None
        self.install(shared)
        return float(self.score_fn(self.model.pipeline))

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the edit."""
        return {**super().settings(), "epochs": self.epochs, "reg": self.reg, "form": self.form}


def joined_rows(rows: Rows, derived: Rows, strength: float) -> Rows:
    """Erase derived rows as well, with a strength relative to that of the given ones."""
    return replace(
        rows,
        erase=torch.cat([rows.erase, derived.erase]),
        guide=torch.cat([rows.guide, derived.guide]),
        weight=torch.cat([rows.weight, strength * derived.weight]),
    )
