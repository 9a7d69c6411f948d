"""Near-duplicates among seeds; cliques against all subsets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from mmforget.data.planted import controls, planted
from mmforget.detection import largest_clique, seed_consistency
from mmforget.errors import ConfigurationError, DataError, RequestError
from mmforget.metrics.copying import NormalisedCorrelation


def graph(nodes: int, share: float, seed: int) -> Tensor:
    draw = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(seed))
    return (draw.triu(1) + draw.triu(1).T) > 1 - share


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_clique_is_the_largest_of_all_subsets(share: float, seed: int) -> None:
    joined = graph(11, share, seed)

    def agree(nodes: tuple[int, ...]) -> bool:
        return all(bool(joined[a, b]) for a, b in combinations(nodes, 2))

    found, exact = largest_clique(joined)
    sizes = [k for k in range(1, 12) for nodes in combinations(range(11), k) if agree(nodes)]
    assert exact and len(found) == max(sizes)
    assert agree(tuple(found)) and found == sorted(set(found))


def test_hard_graphs_of_the_largest_exact_size_are_quick() -> None:
    triples = torch.ones(64, 64, dtype=torch.bool)
    for start in range(0, 64, 3):  # 3^21 maximal cliques
        triples[start : start + 3, start : start + 3] = False
    assert len(largest_clique(triples)[0]) == 22
    assert len(largest_clique(graph(64, 0.8, 0))[0]) >= 15


def test_large_graphs_get_a_clique_that_may_not_be_the_largest() -> None:
    joined = graph(80, 0.2, 1)
    hidden = torch.arange(0, 60, 5)
    joined[hidden[:, None], hidden] = True
    found, exact = largest_clique(joined)
    assert not exact and found == hidden.tolist()
    assert all(bool(joined[a, b]) for a, b in combinations(found, 2))


def test_no_graph_is_refused() -> None:
    assert largest_clique(torch.zeros(0, 0, dtype=torch.bool)) == ([], True)
    for joined in (
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 2),
        torch.ones(2, 2).triu() > 0,
    ):
        with pytest.raises(DataError, match="symmetric square"):
            largest_clique(joined)


def drawn() -> tuple[Tensor, list[str]]:
    """Six near copies; four near copies and two others; six different sheets."""
    draw = torch.Generator().manual_seed(0)
    sheet, other = planted()[0].image, planted()[1].image
    different = controls(12)
    images = torch.cat(
        [sheet.expand(6, -1, -1, -1), other.expand(4, -1, -1, -1), different[:2], different[4:10]]
    )
    noise = 0.03 * torch.randn(images.shape, generator=draw)
    return (images + noise).clamp(0, 1), ["copied", "partly", "free"]


def test_prompts_whose_pictures_agree_are_flagged() -> None:
    images, prompts = drawn()
    report = seed_consistency(images, prompts, clique=4)
    assert report.scores == {"copied": 6, "partly": 4, "free": 1}
    flags = [report.details[prompt]["flagged"] for prompt in prompts]
    assert flags == [True, True, False]
    assert report.details["partly"]["members"] == [0, 1, 2, 3]
    assert seed_consistency(images, prompts, clique=5).details["partly"]["flagged"] is False
    assert report.queries == 0 and report.protocol["similarity"]["name"] == "l2"


def test_the_similarity_and_its_threshold_can_be_chosen() -> None:
    images, prompts = drawn()
    likeness = NormalisedCorrelation()
    report = seed_consistency(images, prompts, clique=2, similarity=likeness, score="similarity")
    pairs = likeness.matrix(images[:6], images[:6])[torch.ones(6, 6).triu(1).bool()]
    assert report.scores["copied"] == pytest.approx(float(pairs.quantile(0.5)))
    assert report.scores["copied"] > report.scores["partly"] > report.scores["free"]
    strict = seed_consistency(images, prompts, clique=2, threshold=0.999)
    assert set(strict.scores.values()) == {1.0}


def test_unfit_arguments_are_refused() -> None:
    images, prompts = drawn()
    with pytest.raises(ConfigurationError, match="`clique` is 10"):
        seed_consistency(images, prompts)
    with pytest.raises(ConfigurationError, match="`score` is 'mean'"):
        seed_consistency(images, prompts, clique=2, score="mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="17 pictures for 3 prompts"):
        seed_consistency(images[:17], prompts, clique=2)
    with pytest.raises(DataError, match="at least two"):
        seed_consistency(images[:3], prompts, clique=2)
    for bad in ([], ["a", "a", "b"], "abc"):
        with pytest.raises(RequestError, match="different texts"):
            seed_consistency(images, bad, clique=2)
