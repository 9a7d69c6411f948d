"""KV eviction: what stays, that dropped equals hidden, and that nothing else changes."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError, DataError, ModelError
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.attention_tap import AttentionCall, recorded_attention
from mmforget.retention.a2sf import A2SF
from mmforget.retention.eviction_policy import EvictionPolicy, RandomKeys, RecentKeys, Rows, Step
from mmforget.retention.heavy_hitters import H2O
from mmforget.retention.kv_eviction import KVEviction
from mmforget.retention.snap_kv import SnapKV
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param)).eval()


@pytest.fixture(scope="module")
def llava() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava")).eval()


def inputs_of(model: MultimodalLM, rows: int = 3) -> dict[str, Any]:
    """One, no and two pictures, so that two of three rows are padded."""
    one, two, three = tiny_pictures(3)
    questions = ["what digit is this ?", "which name ?", "look again , what are the names ?"]
    batch = {"images": [[one], [], [two, three]][:rows], "question": questions[:rows]}
    return model.family.model_inputs(model.inputs(batch, padding="left", answers=False))


def apart(one: Any, other: Any) -> float:
    """Largest difference of the logits of two answers."""
    pairs = zip(one.logits, other.logits, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def evicted(
    model: MultimodalLM, inputs: dict[str, Any], policy: EvictionPolicy, **settings: Any
) -> tuple[Any, KVEviction]:
    options = {name: settings.pop(name) for name in ("num_beams",) if name in settings}
    with KVEviction(model.network, policy, **settings) as eviction:
        return model.network.generate(**inputs, **(GREEDY | options)), eviction


def layer_of(output: Any, number: int) -> Any:
    return output.past_key_values.layers[number]


# ---- dropped equals hidden ----------------------------------------------------------------------


@torch.no_grad()
def test_evicted_equals_masked(model: MultimodalLM) -> None:
    inputs = inputs_of(model)
    whole = model.network.generate(**inputs, **GREEDY)
    prompt = inputs["input_ids"].shape[1]
    for settings in (
        {"budget": 12, "when": "prefill"},
        {"budget": 0.4, "when": "every_step", "per_head": False, "sink": 1, "recent": 2},
        {"budget": 20, "when": "every_step", "visual_only": True},
    ):
        dropped, eviction = evicted(model, inputs, A2SF(0.3), **settings)
        masked, hiding = evicted(model, inputs, A2SF(0.3), mode="mask", **settings)
        assert apart(dropped, masked) < 1e-5 < 1e-2 < apart(dropped, whole)
        assert set(hiding.lengths.values()) == {prompt + 3}
        assert max(eviction.lengths.values()) < prompt
        assert eviction.cache_bytes < hiding.cache_bytes / 1.5
        if settings["when"] == "prefill":
            assert eviction.lengths == dict.fromkeys(range(3), 12 + 3)
    same, _ = evicted(model, inputs, A2SF(0.3), budget=prompt + 4, when="every_step")
    assert apart(same, whole) == 0
    again = model.network.generate(**inputs, **GREEDY)
    assert apart(again, whole) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "policy", [A2SF(0.0), A2SF(1.0), H2O(), SnapKV(4, 3), RecentKeys(), RandomKeys()]
)
def test_every_policy_drops_what_it_hides(llava: MultimodalLM, policy: EvictionPolicy) -> None:
    inputs = inputs_of(llava)
    when = "prefill" if policy.prefill_only else "every_step"
    for budget in (0, 9):
        one, _ = evicted(llava, inputs, policy, budget=budget, when=when, block=7)
        two, _ = evicted(llava, inputs, policy, budget=budget, when=when, mode="mask")
        assert apart(one, two) < 1e-5


@torch.no_grad()
def test_against_a_mask_given_by_hand(llava: MultimodalLM) -> None:
    """A window of recent keys is a prompt whose older tokens are masked once it has been read."""
    from transformers import DynamicCache

    inputs, window = inputs_of(llava), 6
    found, _ = evicted(llava, inputs, RecentKeys(), budget=window)
    cache, mask = DynamicCache(), inputs["attention_mask"].clone()
    number = mask.cumsum(dim=1)
    places = (number - 1).clamp(min=0)
    output = llava.network(**inputs, position_ids=places, past_key_values=cache)
    hidden = mask * (number > number[:, -1:] - window)
    for step in range(1, 4):
        token = output.logits[:, -1:].argmax(dim=-1)
        hidden = torch.cat([hidden, torch.ones_like(token)], dim=1)
        output = llava.network(
            input_ids=token,
            attention_mask=hidden,
            position_ids=number[:, -1:] + step - 1,
            past_key_values=cache,
        )
        gap = float((output.logits[:, -1] - found.logits[step]).abs().max())
        assert gap < 1e-5


@torch.no_grad()
def test_eager_kernel_beams_and_a_second_question(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava)
    settings: dict[str, Any] = {"budget": 10, "when": "every_step", "recent": 1}
    wanted, _ = evicted(llava, inputs, H2O(), **settings)
    language = llava.family.language_model(llava.network)
    language.set_attn_implementation("eager")
    found, _ = evicted(llava, inputs, H2O(), **settings)
    language.set_attn_implementation("sdpa")
    assert apart(found, wanted) < 1e-4

    beams, _ = evicted(llava, inputs, A2SF(0.5), num_beams=3, **settings)
    hidden, _ = evicted(llava, inputs, A2SF(0.5), num_beams=3, mode="mask", **settings)
    assert torch.equal(beams.sequences, hidden.sequences)
    assert layer_of(beams, 0).positions.shape[0] == 3 * 3
    whole = llava.network.generate(**inputs, **(GREEDY | {"num_beams": 3}))
    same, _ = evicted(llava, inputs, A2SF(0.5), budget=999, num_beams=3)
    assert torch.equal(whole.sequences, same.sequences)

    follow_up = torch.tensor([[5, 6, 7, 8]]).expand(3, -1)
    logits = []
    for mode in ("drop", "mask"):
        with KVEviction(llava.network, H2O(), budget=10, mode=mode) as eviction:  # type: ignore[arg-type]
            first = llava.network(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(follow_up)], dim=1)
            second = llava.network(
                input_ids=follow_up, attention_mask=mask, past_key_values=first.past_key_values
            )
        logits.append(second.logits)
        length = inputs["input_ids"].shape[1] + 4
        assert eviction.lengths[0] == (10 if mode == "drop" else length)
        assert second.past_key_values.get_seq_length() == length
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_with_adapters(llava: MultimodalLM) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=r".*language_model.*(q|k)_proj", init_lora_weights=False
    )
    wrapped: Any = get_peft_model(tiny_multimodal("llava")[0], config).eval()
    inputs, found = inputs_of(llava), []
    for mode in ("drop", "mask"):
        with KVEviction(wrapped, A2SF(), 20, visual_only=True, mode=mode) as eviction:  # type: ignore[arg-type]
            found.append(wrapped.generate(**inputs, **GREEDY))
        with KVEviction(wrapped, A2SF(), 20, visual_only=True, mode=mode):  # type: ignore[arg-type]
            last = wrapped(**inputs).logits[:, -1]
        torch.testing.assert_close(last, found[-1].logits[0], rtol=0, atol=1e-4)
    assert apart(*found) < 1e-5 and min(eviction.lengths.values()) > 0


# ---- scores -------------------------------------------------------------------------------------


def rows_of(weights: Tensor, valid: Tensor, block: int) -> Any:
    after = valid.flip(1).cumsum(dim=1).flip(1) - valid.long()

    def rows(last: int | None) -> Any:
        for part in torch.arange(valid.shape[1]).split(block):
            near = valid if last is None else valid & (after < last)
            yield Rows(weights[:, :, part], after[:, part], near[:, part])

    return rows


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_recursion_equals_direct_sum(alpha: float) -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 2, 9, 9).tril()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :3], valid[1, 7:] = False, False  # padding on either side
    weights = weights * valid[:, None, :, None]
    places = torch.arange(9).expand(2, 2, -1)
    direct = torch.zeros(2, 2, 9)
    for row, last in ((0, 8), (1, 6)):
        for query in range(9):
            if valid[row, query]:
                direct[row] += alpha ** (last - query) * weights[row, :, query]
    policy, zeros = A2SF(alpha), torch.zeros(2, 2, 9)
    for block in (1, 4, 9):
        step = Step(0, 0, places, valid, rows_of(weights, valid, block))
        torch.testing.assert_close(policy.update(zeros, step), direct)
    score = zeros
    for query in range(9):
        now = slice(query, query + 1)
        rows = rows_of(weights[:, :, now], valid[:, now], 1)
        score = policy.update(score, Step(0, query, places, valid[:, now], rows))
    torch.testing.assert_close(score, direct)
    assert policy.reach is None or alpha**policy.reach < 1e-8


@torch.no_grad()
def test_scores_are_sums_of_attention(llava: MultimodalLM) -> None:
    """One network, all factors: 1 is the plain sum, 0 the last row; blocks change nothing."""
    inputs = inputs_of(llava)
    real = inputs["attention_mask"]
    with recorded_attention(llava.network, rows="all") as record:
        llava.network(**inputs)
    heads = record[1][0].unflatten(1, (2, 2)).sum(dim=2)  # of a group

    def score(policy: EvictionPolicy, **settings: Any) -> Tensor:
        settings = {"budget": 999, "block": 5} | settings
        output, _ = evicted(llava, inputs, policy, **settings)
        return layer_of(output, 1).score[..., : real.shape[1]]

    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score(A2SF(1.0)), heads.sum(dim=2), **close)
    torch.testing.assert_close(score(H2O()), heads.sum(dim=2), **close)
    torch.testing.assert_close(score(A2SF(0.0)), heads[:, :, -1], **close)
    torch.testing.assert_close(score(SnapKV(4, 1)), heads[:, :, -4:].sum(dim=2), **close)
    shared = score(A2SF(1.0), per_head=False)
    torch.testing.assert_close(shared[:, 0], heads.sum(dim=(1, 2)), **close)
    factors = 0.8 ** torch.arange(heads.shape[2] - 1, -1, -1)
    wanted = torch.einsum("bgqk,q->bgk", heads, factors)
    for block in (1, 16, 500):
        torch.testing.assert_close(score(A2SF(0.8), block=block), wanted, **close)
    smooth = score(SnapKV(4, 3))
    votes = heads[:, :, -4:].sum(dim=2)
    torch.testing.assert_close(smooth[..., 5], votes[..., 4:7].mean(dim=-1), **close)
    torch.testing.assert_close(smooth[..., 0], votes[..., :2].mean(dim=-1), **close)

    plain, _ = evicted(llava, inputs, A2SF(1.0), budget=11, when="every_step")
    heavy, _ = evicted(llava, inputs, H2O(recent_share=0), budget=11, when="every_step")
    assert apart(plain, heavy) == 0
    half, _ = evicted(llava, inputs, H2O(), budget=11)
    window, _ = evicted(llava, inputs, A2SF(1.0), budget=11, recent=5)
    assert apart(half, window) == 0


@torch.no_grad()
def test_memory_grows_with_the_block(llava: MultimodalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, seen = inputs_of(llava), []
    weights = AttentionCall.weights

    def noted(call: AttentionCall, index: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(index.shape[1])
        return weights(call, index)

    monkeypatch.setattr(AttentionCall, "weights", noted)
    evicted(llava, inputs, A2SF(1.0), budget=8, block=6)
    assert max(seen) == 6 and sum(seen) == 3 * inputs["input_ids"].shape[1]
    seen.clear()
    evicted(llava, inputs, A2SF(0.1), budget=8)  # only the last rows can matter
    assert seen == [math.ceil(9 / 1)] * 3
    seen.clear()
    evicted(llava, inputs, RecentKeys(), budget=8)
    assert not seen


# ---- what stays ---------------------------------------------------------------------------------


@torch.no_grad()
def test_protected_keys_stay(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava)
    visual = llava.family.visual_mask(llava.network, inputs["input_ids"])
    real = inputs["attention_mask"].bool()
    length = real.shape[1]

    def kept(**settings: Any) -> list[set[int]]:
        """Per row the prompt's keys that every layer and head has."""
        output, _ = evicted(llava, inputs, RandomKeys(), **settings)
        layers = [layer_of(output, number) for number in range(3)]
        return [
            set.intersection(
                *(
                    set(places[alive].tolist())
                    for layer in layers
                    for places, alive in zip(layer.positions[row], layer.alive[row], strict=True)
                )
            )
            & set(range(length))
            for row in range(3)
        ]

    for row, found in enumerate(kept(budget=10, sink=2, recent=3)):
        places = real[row].nonzero()[:, 0].tolist()
        assert {*places[:2], *places[-3:]} <= found
        assert len(found) < 10 or len(places) <= 10
    for row, found in enumerate(kept(budget=0, visual_only=True)):
        assert found == set((real & ~visual)[row].nonzero()[:, 0].tolist())
    output, _ = evicted(llava, inputs, RandomKeys(), budget=0.5)
    layer = layer_of(output, 2)
    number = (layer.alive & (layer.positions < length)).sum(dim=-1)
    wanted = torch.floor(real.sum(dim=1) * 0.5 + 0.5).long()
    assert torch.equal(number, wanted[:, None].expand(-1, 2))
    assert (layer.positions.diff(dim=-1) > 0).all()
    heads = [set(one.tolist()) for one in layer.positions[2]]
    assert heads[0] != heads[1]
    output, _ = evicted(llava, inputs, RandomKeys(), budget=0.5, per_head=False)
    assert layer_of(output, 2).positions.shape[1] == 1


@torch.no_grad()
def test_every_step_holds_the_budget(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava)
    for budget, length in ((10, 10), (0, 0)):
        output, eviction = evicted(llava, inputs, A2SF(0.2), budget=budget, when="every_step")
        assert eviction.lengths == dict.fromkeys(range(3), length)
        assert eviction.cache_bytes == 3 * 2 * 3 * 2 * length * 8 * 4  # layers, k and v, B, heads
        assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_positions_grow_on(model: MultimodalLM) -> None:
    inputs = inputs_of(model)
    found: list[list[Tensor]] = [[], []]
    for run, budget in enumerate((999, 5)):

        def note(_m: Any, _a: Any, kwargs: dict[str, Any], to: Any = found[run]) -> None:
            to.append(kwargs["position_embeddings"][0])

        layer = model.family.layers(model.network)[2]
        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        evicted(model, inputs, RecentKeys(), budget=budget, when="every_step")
        handle.remove()
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_the_same_seed_draws_the_same_keys(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava)
    one, _ = evicted(llava, inputs, RandomKeys(1), budget=9, when="every_step")
    two, _ = evicted(llava, inputs, RandomKeys(1), budget=9, when="every_step")
    other, _ = evicted(llava, inputs, RandomKeys(2), budget=9, when="every_step")
    assert apart(one, two) == 0 < apart(one, other)


# ---- what is refused ----------------------------------------------------------------------------


@torch.no_grad()
def test_unsuited_caches_are_refused(llava: MultimodalLM) -> None:
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    network, inputs = llava.network, inputs_of(llava)
    text = network.config.text_config
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(3)]
    filled = DynamicCache()
    network(**inputs, past_key_values=filled)
    with KVEviction(network, A2SF(), 8):
        elsewhere = network(**inputs).past_key_values
    step = inputs | {"attention_mask": torch.cat([inputs["attention_mask"]] * 2, dim=1)}
    for cache, given, message in (
        (StaticCache(config=text, max_cache_len=99), inputs, "from StaticCache; use a plain"),
        (sliding, inputs, "layer 0 of the cache is a DynamicSlidingWindowLayer"),
        (filled, step, "already holds"),
        (elsewhere, step, "filled in another KVEviction block"),
    ):
        with KVEviction(network, A2SF(), 8), pytest.raises(CapabilityError, match=message):
            network(**given, past_key_values=cache)
    with KVEviction(network, A2SF(), 8):
        with pytest.raises(ConfigurationError, match="no cache to evict from"):
            network.generate(**inputs, max_new_tokens=2, use_cache=False)
        cache = network(**inputs).past_key_values
        with pytest.raises(CapabilityError, match="generate without an assistant"):
            cache.crop(-1)
    embedded = {"inputs_embeds": torch.zeros(1, 4, 32), "use_cache": True}
    with (
        KVEviction(network, A2SF(), 8, visual_only=True),
        pytest.raises(ConfigurationError, match="call the network with `input_ids`"),
    ):
        network(**embedded)
    with pytest.raises(ModelError, match="float16 on the CPU"):
        KVEviction(tiny_multimodal("llava")[0].half(), A2SF(), 8)


def test_bad_settings_are_refused(llava: MultimodalLM) -> None:
    network = llava.network
    for settings, message in (
        ({"budget": -1}, "`budget` is -1"),
        ({"budget": 1.5}, "`budget` is 1.5"),
        ({"budget": 3, "when": "always"}, "`when` is 'always'"),
        ({"budget": 3, "mode": "hide"}, "`mode` is 'hide'"),
        ({"budget": 3, "sink": -1}, "`sink` is -1"),
        ({"budget": 3, "recent": -2}, "`recent` is -2"),
        ({"budget": 3, "block": 0}, "`block` is 0"),
        ({"budget": 3, "policy": SnapKV(), "when": "every_step"}, "SnapKV scores the prompt only"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            KVEviction(network, **({"policy": A2SF()} | settings))  # type: ignore[arg-type]
    for build in (
        lambda: A2SF(1.1), lambda: A2SF(-0.1), lambda: H2O(2.0),
        lambda: SnapKV(0), lambda: SnapKV(4, 2), lambda: SnapKV(4, 0),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            build()


@torch.no_grad()
def test_nothing_is_left_behind(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava)

    def hooks() -> list[int]:
        modules = llava.network.modules()
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]

    class Damaged(A2SF):
        def update(self, score: Tensor, step: Step) -> Tensor:
            return score * torch.nan

    before, names = hooks(), list(llava.network.state_dict())
    with pytest.raises(DataError, match="scores of Damaged in layer 0 are not finite"):
        evicted(llava, inputs, Damaged(), budget=4)
    assert hooks() == before and list(llava.network.state_dict()) == names
    assert llava.network.config.text_config._attn_implementation == "sdpa"
    language = llava.family.language_model(llava.network)
    language.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(CapabilityError, match="cannot be tapped"):
        KVEviction(llava.network, A2SF(), 4).__enter__()
    language.set_attn_implementation("sdpa")
    assert hooks() == before
