"""VisionZip: the tower's attention on every family, dominant and contextual tokens."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import ConfigurationError
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.token_reduction import PictureTokens
from mmforget.retention.tower_attention import tower_view
from mmforget.retention.vision_zip import VisionZip
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)


@cache
def model_of(kind: TinyMultimodalKind) -> MultimodalLM:
    """Shared: no test may change it."""
    return MultimodalLM(*tiny_multimodal(kind)).eval()


def encoded(model: MultimodalLM) -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    asked = {"images": [[one], [two, three], []], "question": ["what ?", "who ?", "where ?"]}
    return model.inputs(asked, padding="left", answers=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_look_into_the_tower_changes_nothing(kind: TinyMultimodalKind) -> None:
    model = model_of(kind)
    network, family, inputs = model.network, model.family, encoded(model)
    configs = [getattr(module, "config", None) for module in network.modules()]
    with torch.no_grad():
        plain = family.encode_images(network, inputs, (-2,))
        view = tower_view(family, network, inputs)
    for one, other in zip(view.features.pooled, plain.pooled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    after = [getattr(module, "config", None) for module in network.modules()]
    assert all(one is other for one, other in zip(after, configs, strict=True))
    assert [one.shape for one in view.attention if one is not None] == [(16,)] * 3
    assert all(keys is not None and keys.shape[0] == 16 for keys in view.keys)
    for picture in range(3):  # a picture's tokens are its own, whatever else the batch holds
        alone = {"images": [[tiny_pictures(3)[picture]]], "question": ["what ?"]}
        single = tower_view(family, network, model.inputs(alone, answers=False))
        for found, expected in (
            (view.attention[picture], single.attention[0]),
            (view.keys[picture], single.keys[0]),
        ):
            assert found is not None and expected is not None
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_the_class_token() -> None:
    """Against the weights that CLIP's eager kernel returns."""
    model = model_of("llava")
    inputs = encoded(model)
    network = tiny_multimodal("llava")[0]
    network.set_attn_implementation("eager")
    with torch.no_grad():
        weights = network.model.vision_tower(
            inputs["pixel_values"], output_attentions=True
        ).attentions
        view = tower_view(model.family, model.network, inputs, -1)
    for picture, found in enumerate(view.attention):
        expected = weights[-1][picture, :, 0, 1:].sum(dim=0)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_vl", "qwen2_5_vl"])
def test_attention_from_all_patches(kind: TinyMultimodalKind) -> None:
    """Without class token a token's patches get 1 on average, in windows of any size."""
    model = model_of(kind)
    picture = torch.cat((tiny_pictures(1)[0], tiny_pictures(1, 1)[0]), dim=2)[:, :, :40]
    inputs = model.inputs({"images": [[picture]], "question": ["what ?"]}, answers=False)
    for block in (0, 1):
        view = tower_view(model.family, model.network, inputs, block)
        assert view.attention[0] is not None
        assert float(view.attention[0].mean()) == pytest.approx(1.0, abs=1e-5)
        assert float(view.attention[0].std()) > 1e-4


def test_windows_are_put_back_in_order() -> None:
    """Qwen2.5-VL sorts its patches by window; keys must stand at their tokens' own places."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    from mmforget.models.multimodals.qwen_vl import window_order

    model = model_of("qwen2_5_vl")
    inputs = encoded(model)
    tower = model.network.model.visual
    attention = tower.blocks[0].attn
    seen: dict[str, Any] = {}
    handles = [
        attention.qkv.register_forward_hook(lambda *given: seen.update(qkv=given[2])),
        attention.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.update(turns=kwargs["position_embeddings"]),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        view = tower_view(model.family, model.network, inputs, 0)
    for handle in handles:
        handle.remove()
    query, key, _ = seen["qkv"].reshape(3 * 64, 3, attention.num_heads, -1).unbind(1)
    _, key = apply_rotary_pos_emb_vision(query, key, *seen["turns"])
    groups = key.mean(dim=1).reshape(48, 4, -1).mean(dim=1)  # four patches become one token
    order = window_order(tower, view.features.raw_grid)
    assert order is not None and order.tolist() != sorted(order.tolist())
    expected = torch.empty_like(groups)
    for sorted_place, place in enumerate(order.tolist()):
        expected[place] = groups[sorted_place]
    found = torch.cat([keys for keys in view.keys if keys is not None])
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def by_hand(tokens: PictureTokens, dominant: int, merged: int, mean: bool) -> dict[int, Tensor]:
    """One token at a time, as the paper says it."""
    assert tokens.attention is not None and tokens.keys is not None
    order = sorted(range(len(tokens.features)), key=lambda n: -float(tokens.attention[n]))  # type: ignore[index]
    found = {place: tokens.features[place] for place in order[:dominant]}
    rest = [n for n in range(len(tokens.features)) if n not in found]
    targets = [rest[number * (len(rest) // merged)] for number in range(merged)]
    joined: dict[int, list[Tensor]] = {target: [] for target in targets}
    for place in rest:
        if place not in joined:
            near = [F.cosine_similarity(tokens.keys[place], tokens.keys[t], dim=0) for t in targets]
            joined[targets[int(torch.stack(near).argmax())]].append(tokens.features[place])
    for target, others in joined.items():
        own = tokens.features[target]
        if mean:
            found[target] = torch.stack([own, *others]).mean(dim=0)
        else:
            found[target] = own + torch.stack(others).mean(dim=0) if others else own
    return found


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize(("keep", "merged"), [(10, 2), (7, 1), (16, 3), (19, 3), (1, 0), (3, 0)])
def test_dominant_and_contextual_tokens(merge: Any, keep: int, merged: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    features, keys = (torch.randn(20, 6, generator=generator) for _ in range(2))
    scores = torch.rand(20, generator=generator)
    tokens = PictureTokens(features, keep, (4, 5), 0, 0, scores, keys)
    found, places = VisionZip(keep_tokens=keep, merge=merge).chosen(tokens)
    assert len(places) == keep
    expected = by_hand(tokens, keep - merged, merged, merge == "mean") if merged else {
        int(n): features[n] for n in scores.topk(keep).indices
    }  # fmt: skip
    assert places.tolist() == sorted(expected)
    torch.testing.assert_close(found, torch.stack([expected[n] for n in places.tolist()]))


def test_settings() -> None:
    with pytest.raises(ConfigurationError, match=r"`contextual` is 1.0"):
        VisionZip(keep_tokens=4, contextual=1.0)
    with pytest.raises(ConfigurationError, match="`merge` is 'max'"):
        VisionZip(keep_tokens=4, merge="max")  # type: ignore[arg-type]
    model = model_of("llava")
    with pytest.raises(ConfigurationError, match=r"`tower_block` is -3, but .* 2 blocks"):
        VisionZip(keep_tokens=4, tower_block=-3).reduced(model.network, encoded(model))
