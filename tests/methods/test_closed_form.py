"""Closed-form edits: the linear algebra against a dense solve, and the choice of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, DivergenceError
from mmforget.methods.closed_form import Embedder, compress, gather, solve
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline


def rows(count: int, width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw, dtype=torch.float64)


def dense(
    weight: Tensor, erase: Tensor, guide: Tensor, keep: Tensor, lam: float, e: Tensor, p: float
) -> Tensor:
    """The paper's formula, written out."""
    eye = torch.eye(erase.shape[1], dtype=torch.float64)
    a = lam * eye + (erase.T * e) @ erase + p * keep.T @ keep
    right = lam * weight + ((guide @ weight.T).T * e) @ erase + p * (keep @ weight.T).T @ keep
    return right @ torch.linalg.inv(a)


@pytest.mark.parametrize("count", [3, 40])
def test_low_rank_equals_dense(count: int) -> None:
    """With fewer rows than columns, and with more."""
    erase, guide, keep = rows(count, 24, 0), rows(count, 24, 1), rows(6, 24, 2)
    weight, e = rows(10, 24, 3), rows(count, 1, 4).square().flatten() + 0.1
    solution = solve(erase, guide, keep, 0.3, e, 0.7)
    left, right = solution.compressed()
    want = dense(weight, erase, guide, keep, 0.3, e, 0.7) - weight
    assert torch.allclose(weight @ solution.difference.T @ solution.down, want, atol=1e-8)
    assert torch.allclose(weight @ left @ right, want, atol=1e-6 * float(want.norm()))
    assert left.shape[1] <= min(count, 24)
    assert solution.residual < 1e-12


def test_limits() -> None:
    erase, guide, keep = rows(3, 24, 0), rows(3, 24, 1), rows(4, 24, 2)
    weight = rows(10, 24, 3)

    def edited(lam: float, e: float = 1.0) -> Tensor:
        solution = solve(erase, guide, keep, lam, e)
        return weight + weight @ solution.difference.T @ solution.down

    assert torch.allclose(edited(1e12), weight, atol=1e-9)
    assert torch.equal(edited(0.1, e=0.0), weight)
    for lam in (0.0, 1e-9):
        assert torch.allclose(edited(lam) @ erase.T, weight @ guide.T, atol=1e-6)
        assert torch.allclose(edited(lam) @ keep.T, weight @ keep.T, atol=1e-6)


def test_order_of_rows_does_not_matter() -> None:
    erase, guide, keep = rows(5, 24, 0), rows(5, 24, 1), rows(4, 24, 2)
    order = torch.tensor([3, 0, 4, 1, 2])
    one = solve(erase, guide, keep, 0.1)
    other = solve(erase[order], guide[order], keep.flip(0), 0.1)
    assert torch.allclose(
        one.difference.T @ one.down, other.difference.T @ other.down, rtol=1e-10, atol=1e-12
    )


def test_no_ridge_needs_independent_rows() -> None:
    erase = rows(3, 24, 0)
    keep = erase.sum(0, keepdim=True)
    with pytest.raises(ConfigurationError, match="too small") as caught:
        solve(erase, rows(3, 24, 1), keep, 0.0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="too small"):
        solve(rows(2, 24, 0).repeat(15, 1), rows(30, 24, 1), keep[:0], 0.0)
    with pytest.raises(ConfigurationError, match="above 0"):
        solve(erase, rows(3, 24, 1), keep, -1.0)
    with pytest.raises(DivergenceError, match="not finite"):
        solve(erase * float("nan"), rows(3, 24, 1), keep, 1.0)


def test_compression_finds_the_rank() -> None:
    up, down = rows(20, 4, 0), rows(4, 30, 1)
    wide_up = up @ rows(4, 9, 2)
    wide_down = torch.linalg.pinv(rows(4, 9, 2)) @ down
    small_up, small_down = compress(wide_up, wide_down)
    assert small_up.shape == (20, 4) and small_down.shape == (4, 30)
    assert torch.allclose(small_up @ small_down, up @ down, atol=1e-9)


# ---- rows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd() -> Embedder:
    return Embedder(DiffusionGenerator(tiny_pipeline("sd")))


def places(embedder: Embedder, sentence: str, word: str, scope: Any) -> list[list[int]]:
    return [where for _, where in embedder.selected(sentence, word, scope)]


def test_positions_of_a_clip_prompt(sd: Embedder) -> None:
    # begin, a, photo, of, van, gogh, street, then ends
    sentence = "a photo of {} street"
    assert places(sd, sentence, "van gogh", "last") == [[6]]
    assert places(sd, sentence, "van gogh", "last_to_end") == [list(range(5, 16))]
    assert places(sd, sentence, "van gogh", "all") == [list(range(16))]
    assert places(sd, sentence, "van gogh", "content_to_eos") == [[4, 5, 7]]
    assert places(sd, sentence, "", "last") == [[0]]
    assert places(sd, sentence, "", "last_to_end") == [list(range(16))]


def test_positions_of_a_t5_prompt() -> None:
    flux = Embedder(DiffusionGenerator(tiny_pipeline("flux")))
    tokens = flux.segments("a cat")[0]
    assert tokens.begin == 0
    count = int(tokens.content.sum())
    for scope, where in (
        ("last", [count - 1]),
        ("last_to_end", [count - 1, count]),
        ("all", list(range(count + 1))),
        ("content_to_eos", list(range(1, count + 1))),
    ):
        assert places(flux, "a {}", "cat", scope) == [where], scope
    # Of the empty text there is the end token only, never a row of padding.
    assert {str(places(flux, "a {}", "", s)) for s in ("last", "last_to_end", "all")} == {"[[0]]"}
    erase, guide = flux.pairs("a {}", "cat", "", "content_to_eos")
    assert len(erase) == len(guide) == count
    assert torch.equal(guide, flux.states("")[:1].expand(count, -1))


def test_sd3_segments_have_their_own_positions() -> None:
    sd3 = Embedder(DiffusionGenerator(tiny_pipeline("sd3")))
    (clip, clip_places), (t5, t5_places) = sd3.selected("{}", "cat", "last_to_end")
    assert (clip, clip_places) == (0, list(range(1, 16)))
    assert t5 == 16 and len(t5_places) == 2
    assert len(sd3.kept("{}", "cat", "last_to_end")) == 17


def test_subjects_are_aligned(sd: Embedder) -> None:
    erase, guide = sd.pairs("a photo of {}", "van gogh", "cat", "last_to_end")
    mine, theirs = sd.states("a photo of van gogh"), sd.states("a photo of cat")
    assert torch.equal(erase, mine[5:])
    assert torch.equal(guide, theirs[4:15])


def test_shared_beginnings_are_preserved(sd: Embedder) -> None:
    """In a causal encoder, 'a photo of' is the same before every word."""
    concept = ConceptSpec("cat", anchor="dog", preserve=("tree",), templates=("a photo of {}",))
    found = gather(sd, [concept], "all")["states"]
    whole = sd.states("a photo of cat")
    assert len(found.erase) == 12
    assert torch.allclose(found.erase, whole[4:])
    # The empty text with the begin token; 'a', 'photo', 'of' once; 12 rows each of tree and dog.
    assert len(found.keep) == 16 + 3 + 12 + 12
    assert (torch.cdist(found.keep, sd.states("")[:1]) < 1e-4).sum() == 1


def test_begin_token_is_never_erased(sd: Embedder) -> None:
    for scope in ("last", "last_to_end", "all"):
        found = gather(sd, [ConceptSpec("cat", anchor="")], scope)["states"]  # type: ignore[arg-type]
        begin = sd.states("")[:1]
        assert (torch.cdist(found.erase, begin) > 1e-3).all()
        assert (torch.cdist(found.keep, begin) < 1e-4).any()
