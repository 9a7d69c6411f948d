"""Regions and the attention to them."""

from __future__ import annotations

import math

import pytest
import torch

from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.retention.region_reader import RegionReader, region_index


def reader(**settings: object) -> RegionReader:
    torch.manual_seed(0)
    return RegionReader(
        **{"width": 8, "source": 6, "inner": 8, "heads": 2, "window": 2, **settings}
    )  # type: ignore[arg-type]


def test_regions_that_divide_the_picture() -> None:
    index = region_index((2, 2), (4, 4), 2)
    assert index.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert region_index((2, 3), (2, 3), 1).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_regions_that_do_not_divide_lie_at_the_nearest_place_inside() -> None:
    # centres of 2 tokens over 5 features: 0.75 and 3.25; windows of 3 start at -0.25 and 2.25
    rows = region_index((2, 1), (5, 3), 3)[:, ::3] // 3
    assert rows.tolist() == [[0, 1, 2], [2, 3, 4]]
    # larger than its share: moved inside at the border
    assert region_index((4, 1), (4, 3), 3)[:, ::3].div(3).int().tolist() == [
        [0, 1, 2],
        [0, 1, 2],
        [1, 2, 3],
        [1, 2, 3],
    ]
    with pytest.raises(CapabilityError, match="`window` of 3 does not fit into 2x4 features"):
        region_index((1, 2), (2, 4), 3)


@pytest.mark.parametrize("saliency", [True, False])
def test_the_formula(saliency: bool) -> None:
    """Token by token and head by head, in loops."""
    module = reader(saliency=saliency)
    torch.nn.init.normal_(module.place)
    states, features = torch.randn(1, 4, 8), torch.randn(1, 16, 6)
    index = region_index((2, 2), (4, 4), 2)
    found = module(states, features, index)[0]
    norm = states[0] / (states[0].square().mean(1, keepdim=True) + torch.finfo().eps).sqrt()
    layer_norm = torch.nn.functional.layer_norm
    query = layer_norm(norm @ module.query[0].weight.T, (8,))
    key = layer_norm(features[0] @ module.key[0].weight.T, (8,))
    value = layer_norm(features[0] @ module.value[0].weight.T, (8,))
    for token in range(4):
        region, heads = index[token], []
        gate = torch.zeros(4)
        if saliency:
            gate = module.saliency(key[region])[:, 0].softmax(0).log()
        for head, part in enumerate((slice(0, 4), slice(4, 8))):
            scores = key[region, part] @ query[token, part] / math.sqrt(4)
            weights = (scores + module.place[head] + gate).softmax(0)
            heads.append(weights @ value[region, part])
        wanted = module.out.weight @ torch.cat(heads)
        assert torch.allclose(found[token], wanted, atol=1e-5)


def test_a_token_sees_its_region_only() -> None:
    module = reader()
    states, features = torch.randn(1, 4, 8), torch.randn(1, 16, 6)
    index = region_index((2, 2), (4, 4), 2)
    before = module(states, features, index)
    outside = torch.tensor([n for n in range(16) if n not in index[1].tolist()])
    changed = features.clone()
    changed[:, outside] = features[:, outside.flip(0)]
    after = module(states, changed, index)
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.allclose(before[:, [0, 2, 3]], after[:, [0, 2, 3]])


def test_guided_tokens_see_each_other_and_the_guide() -> None:
    module = reader(text_guided=True)
    states, features, guide = torch.randn(2, 4, 8), torch.randn(2, 16, 6), torch.randn(2, 8)
    index = region_index((2, 2), (4, 4), 2)
    before = module(states, features, index, guide)
    changed = features.clone()
    changed[0, 15] += 1  # in the region of the last token
    after = module(states, changed, index, guide)
    assert not torch.allclose(before[0, 0], after[0, 0])
    assert torch.equal(before[1], after[1])  # other pictures stay apart
    assert not torch.allclose(before[0], module(states, features, index, guide + 1)[0])


def test_settings() -> None:
    with pytest.raises(ConfigurationError, match="`inner` is 9; it must be a multiple of 2"):
        reader(inner=9)
    with pytest.raises(ConfigurationError, match="`window` is 0"):
        reader(window=0)
