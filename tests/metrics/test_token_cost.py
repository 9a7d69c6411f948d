"""Operations and memory against counts by hand; times in turns."""

from __future__ import annotations

import time

import pytest
import torch

from mmforget.errors import ConfigurationError
from mmforget.metrics.token_cost import DecoderShape, generation_latency, measured_latency
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.token_reduction import token_reducer
from mmforget.testing.tiny_multimodal import tiny_multimodal, tiny_pictures


def test_operations_of_one_layer_by_hand() -> None:
    shape = DecoderShape(layers=1, width=4, query_width=6, key_width=2, inner=8)
    n = 3
    projections = 2 * n * 4 * (6 + 2 + 2) + 2 * n * 6 * 4
    attention = 2 * (2 * n * n * 6)
    gated = 3 * (2 * n * 4 * 8)
    assert shape.prefill_flops([n]) == projections + attention + gated
    one = projections // n + gated // n
    assert shape.decode_flops([n]) == one + 2 * (2 * 4 * 6)
    assert shape.decode_flops([n], 2) == 2 * one + 2 * (2 * 4 * 6) + 2 * (2 * 5 * 6)
    assert shape.cache_bytes([n]) == 2 * 3 * 2 * 2


def test_the_formula_of_the_fast_v_paper() -> None:
    """Without grouped heads: 8nD^2 + 4n^2D + 6nDm per layer, a multiply-add counted as two."""
    shape = DecoderShape(32, 4096, 4096, 4096, 11008)
    lengths = shape.lengths(612, 324, 2)
    assert lengths == [612] * 2 + [324] * 30
    expected = sum(
        8 * n * 4096**2 + 4 * n * n * 4096 + 6 * n * 4096 * 11008 for n in (612, *[324] * 15)
    )
    assert shape.prefill_flops(lengths) == 2 * expected


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_shapes_and_cache_of_networks(kind: str) -> None:
    model = MultimodalLM(*tiny_multimodal(kind)).eval()  # type: ignore[arg-type]
    shape = DecoderShape.of(model.network)
    assert shape == DecoderShape(3, 32, 32, 16, 48)
    asked = {"images": [tiny_pictures(1)], "question": ["what is this ?"]}
    inputs = model.family.model_inputs(model.inputs(asked, padding="left", answers=False))
    tokens = inputs["input_ids"].shape[1]
    reducer = token_reducer("fast_v", keep_tokens=5, layer=1)
    with reducer.on(model.network), torch.no_grad():
        output = model.network(**inputs, use_cache=True)
    held = output.cache if "cache" in output else output.past_key_values
    size = sum(part.nbytes for layer in held.layers for part in (layer.keys, layer.values))
    assert shape.cache_bytes(shape.lengths(tokens, tokens - 11, 1), number_bytes=4) == size


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    found = measured_latency({"slow": slow, "fast": lambda: order.append("fast")}, repeats=3)
    assert order == ["slow", "fast"] * 5
    assert len(found["slow"].all) == 3
    assert found["slow"].seconds == sorted(found["slow"].all)[1] >= 0.02 > found["fast"].seconds
    assert found["slow"].threads == torch.get_num_threads()
    with pytest.raises(ConfigurationError, match="`repeats` is 0"):
        measured_latency({"slow": slow}, repeats=0)


def test_generation_is_timed_per_token() -> None:
    model = MultimodalLM(*tiny_multimodal("llava")).eval()
    asked = {"images": [tiny_pictures(1)], "question": ["what is this ?"]}
    inputs = model.inputs(asked, padding="left", answers=False)
    reducers = {"all": None, "pooling": token_reducer("pooling", keep_tokens=4)}
    found = generation_latency(model.network, inputs, reducers, 3, repeats=1, warmups=0)
    assert set(found) == {"all", "pooling"}
    for one in found.values():
        assert one.per_token == pytest.approx((one.total.seconds - one.prefill.seconds) / 2)
    single = generation_latency(model.network, inputs, {"all": None}, 1, repeats=1, warmups=0)
    assert single["all"].per_token is None and single["all"].prefill == single["all"].total
