"""Attention weights by recomputation and by the tap, against the eager kernel of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals import attention_tap
from mmforget.models.multimodals.attention import recomputed_attention
from mmforget.models.multimodals.attention_tap import (
    AttentionCall,
    attentions_of,
    intercepted_attention,
    recorded_attention,
)
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)
By = Literal["kernel", "recompute"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param)).eval()


@pytest.fixture(scope="module")
def llava() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava")).eval()


def inputs_of(model: MultimodalLM, padding: Literal["left", "right"] = "left") -> dict[str, Any]:
    """One, no and two pictures, so that two of three rows are padded."""
    one, two, three = tiny_pictures(3)
    questions = ["what digit is this ?", "which name ?", "look again , what are the names ?"]
    batch = {"images": [[one], [], [two, three]], "question": questions}
    return model.family.model_inputs(model.inputs(batch, padding=padding, answers=False))


@contextmanager
def eager(model: MultimodalLM) -> Iterator[None]:
    language = model.family.language_model(model.network)
    language.set_attn_implementation("eager")
    yield
    language.set_attn_implementation("sdpa")


def differ(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == torch.float32
    return float((found - wanted).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_weights_are_those_of_eager_attention(
    model: MultimodalLM, padding: Literal["left", "right"]
) -> None:
    inputs = inputs_of(model, padding)
    real = inputs["attention_mask"].bool()[:, None, :, None]
    assert (real.sum(dim=2) < real.shape[2]).any()  # some rows are padded
    before = model.network(**inputs).logits
    for by in get_args(By):
        with recorded_attention(model.network, rows="all", by=by) as fused:
            assert torch.equal(model.network(**inputs).logits, before)
        with eager(model), recorded_attention(model.network, rows="all", by=by) as same:
            wanted = attentions_of(model.network(**inputs, output_attentions=True))
        assert list(fused) == [0, 1, 2] and len(wanted) == 3
        for layer in fused:
            assert differ(same[layer][0], wanted[layer] * real) < 1e-6
            # layers above the first get other hidden states from another kernel
            assert differ(fused[layer][0], wanted[layer] * real) < (3e-6 if layer else 1e-6)
            ones = real.expand(fused[layer][0].shape)[..., 0].float()
            torch.testing.assert_close(fused[layer][0].sum(dim=-1), ones)


@torch.no_grad()
def test_weights_while_generating(model: MultimodalLM) -> None:
    inputs = inputs_of(model)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    before = model.network.generate(**inputs, **options)
    with (
        recorded_attention(model.network, layers=[0, -1]) as tapped,
        recorded_attention(model.network, layers=[0, -1], by="recompute") as recomputed,
    ):
        after = model.network.generate(**inputs, **options)
    for one, other in zip(before.logits, after.logits, strict=True):
        assert torch.equal(one, other)
    with eager(model):
        wanted = model.network.generate(**inputs, **options, output_attentions=True).attentions
    assert list(tapped) == [0, 2]
    for layer in tapped:
        for step in range(3):
            assert differ(tapped[layer][step], wanted[step][layer][:, :, -1:]) < 1e-6
            assert differ(recomputed[layer][step], wanted[step][layer][:, :, -1:]) < 1e-6


@torch.no_grad()
def test_rows_may_be_chosen_per_sequence(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava, "right")
    last = inputs["attention_mask"].sum(dim=1) - 1
    found = {}

    def hook(module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        given = (kwargs["hidden_states"], kwargs["position_embeddings"])
        mask = kwargs["attention_mask"]
        rows = torch.stack([last, last - 1], dim=1)
        found["all"] = recomputed_attention(module, *given, mask)
        found["each"] = recomputed_attention(module, *given, mask, rows)
        found["shared"] = recomputed_attention(module, *given, mask, torch.tensor([2, -1]))
        found["flash"] = recomputed_attention(module, *given, inputs["attention_mask"])
        with pytest.raises(ConfigurationError, match="`rows` reaches from 0 to 99"):
            recomputed_attention(module, *given, mask, torch.tensor([0, 99]))
        with pytest.raises(DataError, match="mask covers"):
            recomputed_attention(module, *given, mask[..., :-1])

    handle = llava.family.layers(llava.network)[1].self_attn.register_forward_pre_hook(
        hook, with_kwargs=True
    )
    llava.network(**inputs)
    handle.remove()
    for row, place in enumerate(last.tolist()):
        wanted = found["all"][row][:, [place, place - 1]]
        torch.testing.assert_close(found["each"][row], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["shared"], found["all"][:, :, [2, -1]], rtol=0, atol=1e-6)
    assert torch.equal(found["flash"], found["all"])
    shorter = int(last.argmin())
    assert not found["shared"][shorter, :, 1].any()  # its last row is padding
    assert found["each"][shorter].sum() > 7.9


def test_no_gradient_is_lost_to_padding(llava: MultimodalLM) -> None:
    grown = []

    def hook(module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        weights = recomputed_attention(
            module,
            kwargs["hidden_states"].detach(),
            kwargs["position_embeddings"],
            kwargs["attention_mask"],
        )
        grown.append(torch.autograd.grad(weights[..., 0].sum(), module.q_proj.weight)[0])

    handle = llava.family.layers(llava.network)[0].self_attn.register_forward_pre_hook(
        hook, with_kwargs=True
    )
    llava.network(**inputs_of(llava))
    handle.remove()
    assert grown[0].isfinite().all() and grown[0].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "own rotation"])
def test_norms_and_rotation_of_other_families(kind: str) -> None:
    """Qwen3 norms every head, Olmo2 all of them together; a module may lack an apply function."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config: Any
    if kind == "qwen3":
        from transformers import Qwen3Config as Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention as Attention
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding as Rotary
    elif kind == "olmo2":
        from transformers import Olmo2Config as Config  # type: ignore[assignment]
        from transformers.models.olmo2.modeling_olmo2 import (  # type: ignore[assignment]
            Olmo2Attention as Attention,
        )
        from transformers.models.olmo2.modeling_olmo2 import (  # type: ignore[assignment]
            Olmo2RotaryEmbedding as Rotary,
        )
    else:
        from transformers import LlamaConfig as Config  # type: ignore[assignment]
        from transformers.models.llama.modeling_llama import (  # type: ignore[assignment]
            LlamaAttention as Attention,
        )
        from transformers.models.llama.modeling_llama import (  # type: ignore[assignment]
            LlamaRotaryEmbedding as Rotary,
        )
    config = Config(**sizes, attention_bias=True, attn_implementation="eager")
    attention: Any = Attention(config, layer_idx=0)
    for name, parameter in attention.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (1.0 if "norm" in name else 0.4))
    hidden = torch.randn(2, 6, 32)
    places = Rotary(config)(hidden, torch.arange(6)[None])
    causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None]
    wanted = attention(hidden, position_embeddings=places, attention_mask=causal)[1]
    if kind == "own rotation":

        class Moved(Attention):  # type: ignore[misc, valid-type]
            """Lives in this file, which has no `apply_rotary_pos_emb`."""

        attention.__class__ = Moved
    assert differ(recomputed_attention(attention, hidden, places, None), wanted) < 1e-6
    assert differ(recomputed_attention(attention, hidden, places, causal), wanted) < 1e-6


@torch.no_grad()
def test_reductions(llava: MultimodalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(llava)
    found: dict[str, Tensor] = {}
    for reduce in ("none", "heads", "keys"):
        with recorded_attention(llava.network, [1], rows="all", reduce=reduce) as record:  # type: ignore[arg-type]
            llava.network(**inputs)
        found[reduce] = record[1][0]
    torch.testing.assert_close(found["heads"], found["none"].mean(dim=1))
    number = inputs["attention_mask"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(found["keys"], found["heads"].sum(dim=1) / number)
    seen = []
    weights = AttentionCall.weights

    def noted(call: AttentionCall, index: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(index.shape[1])
        return weights(call, index)

    monkeypatch.setattr(attention_tap, "BLOCK", 7)
    monkeypatch.setattr(AttentionCall, "weights", noted)
    with recorded_attention(llava.network, [1], rows="all", reduce="keys") as record:
        llava.network(**inputs)
    torch.testing.assert_close(record[1][0], found["keys"])
    assert max(seen) == 7 and sum(seen) == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_nothing_is_left_behind(llava: MultimodalLM) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def state() -> tuple[Any, ...]:
        hooks = [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in llava.network.named_modules()
        ]
        kernels = [list(AttentionInterface()), list(AttentionMaskInterface())]
        config = llava.network.config
        used = [config.text_config._attn_implementation, config.vision_config._attn_implementation]
        return hooks, kernels, used, list(llava.network.state_dict())

    before = state()
    for by in get_args(By):
        with (
            pytest.raises(KeyError, match="stop"),
            recorded_attention(llava.network, by=by),
            recorded_attention(llava.network, by=by),
        ):
            llava.network(**inputs_of(llava))
            assert state() != before
            raise KeyError("stop")
        assert state() == before

    def broken(call: AttentionCall) -> Any:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), intercepted_attention(llava.network, broken):
        llava.network(**inputs_of(llava))
    assert state() == before


@torch.no_grad()
def test_adapters_count(llava: MultimodalLM) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    network: Any = tiny_multimodal("llava")[0]
    config = LoraConfig(
        r=2, target_modules=r".*language_model.*(q|k)_proj", init_lora_weights=False
    )
    wrapped = get_peft_model(network, config).eval()
    inputs = inputs_of(llava)
    before = wrapped(**inputs).logits
    found = []
    for by in get_args(By):
        with recorded_attention(wrapped, rows="all", by=by) as record:
            assert torch.equal(wrapped(**inputs).logits, before)
        found.append(record[2][0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    with recorded_attention(llava.network, rows="all") as plain:
        llava.network(**inputs)
    assert float((plain[2][0] - found[0]).abs().max()) > 0.01


@torch.no_grad()
def test_errors_name_the_remedy(llava: MultimodalLM) -> None:
    network = llava.network
    with pytest.raises(CapabilityError, match="use recorded_attention"):
        attentions_of(network(**inputs_of(llava), output_attentions=True))
    with pytest.raises(ConfigurationError, match="layer 3; the decoder has layers 0 to 2"):
        recorded_attention(network, layers=[3]).__enter__()
    with pytest.raises(ConfigurationError, match="names no layer"):
        recorded_attention(network, layers=[]).__enter__()
    with pytest.raises(ConfigurationError, match="`reduce` is 'head', did you mean 'heads'"):
        recorded_attention(network, reduce="head").__enter__()  # type: ignore[arg-type]
    language = llava.family.language_model(network)
    language.config._attn_implementation_internal = "flex_attention"
    try:
        with pytest.raises(CapabilityError, match="'flex_attention' cannot be tapped"):
            recorded_attention(network).__enter__()
    finally:
        language.set_attn_implementation("sdpa")
