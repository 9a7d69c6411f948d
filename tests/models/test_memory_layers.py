"""Which layers memories are looked for in: per family, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmforget.errors import CapabilityError, ConfigurationError, ModelError
from mmforget.models.memory_layers import memory_layers
from mmforget.testing.tiny_pipelines import tiny_pipeline

BLOCKS = {
    "unet": [
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
    ],
    "joint": ["transformer_blocks.0", "transformer_blocks.1"],
}
SINGLE = "single_transformer_blocks.0"
LAYERS = {
    ("unet", "ffn_out"): "ff.net.2",
    ("unet", "ffn_in"): "ff.net.0.proj",
    ("unet", "cross_value"): "attn2.to_v",
    ("unet", "cross_key"): "attn2.to_k",
    ("joint", "ffn_out"): "ff.net.2",
    ("joint", "ffn_in"): "ff.net.0.proj",
    ("joint", "cross_value"): "attn.add_v_proj",
    ("joint", "cross_key"): "attn.add_k_proj",
}


def network(kind: Any) -> Any:
    pipeline = tiny_pipeline(kind)
    return getattr(pipeline, "unet", None) or pipeline.transformer


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "sd35", "flux"])
@pytest.mark.parametrize("layers", ["ffn_out", "ffn_in", "cross_value", "cross_key"])
def test_every_family_has_the_layers_of_the_table(kind: Any, layers: Any) -> None:
    shape = "joint" if kind in ("sd3", "sd35", "flux") else "unet"
    expected = [f"{block}.{LAYERS[shape, layers]}" for block in BLOCKS[shape]]
    if kind == "flux" and layers.startswith("ffn"):
        expected.append(f"{SINGLE}.{'proj_out' if layers == 'ffn_out' else 'proj_mlp'}")
    given = network(kind)
    found = memory_layers(given, layers)
    assert [layer.name for layer in found] == expected
    for layer in found:
        assert layer.module is given.get_submodule(layer.name)
        assert layer.weight.shape == (layer.module.out_features, layer.width)


def test_single_blocks_of_flux_give_the_hidden_units_alone() -> None:
    layer = memory_layers(network("flux"), "ffn_out")[-1]
    # The first 32 columns read the attention, the other 4 * 32 the hidden units.
    assert (layer.columns, layer.width) == (slice(32, 160), 128)
    assert torch.equal(layer.weight, layer.module.weight[:, 32:])


def test_text_stream_layers_exist_where_the_text_has_a_stream() -> None:
    names = [layer.name for layer in memory_layers(network("sd3"), "ffn_context_out")]
    assert names == ["transformer_blocks.0.ff_context.net.2"]  # the last block has none
    assert len(memory_layers(network("flux"), "ffn_context_out")) == 2
    with pytest.raises(CapabilityError, match="UNet2DConditionModel has no layers of kind"):
        memory_layers(network("sd"), "ffn_context_out")


def test_networks_without_a_pipeline_of_ours_are_found_by_structure() -> None:
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "norm_num_groups": 4,
    }
    pixart = PixArtTransformer2DModel(cross_attention_dim=16, caption_channels=16, **sizes)
    dit = DiTTransformer2DModel(**sizes)
    for given in (pixart, dit):
        names = [layer.name for layer in memory_layers(given)]
        assert names == ["transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"]
    assert [layer.name for layer in memory_layers(pixart, "cross_value")] == [
        "transformer_blocks.0.attn2.to_v",
        "transformer_blocks.1.attn2.to_v",
    ]
    with pytest.raises(CapabilityError, match="use 'ffn_out'"):
        memory_layers(dit, "cross_value")


def test_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'ffn_out'"):
        memory_layers(network("sd"), "ffn_outs")  # type: ignore[arg-type]


def test_network_without_feed_forward_layers_is_refused() -> None:
    with pytest.raises(CapabilityError, match="Linear has no layers"):
        memory_layers(torch.nn.Linear(2, 2))


@pytest.mark.slow  # the compiler takes 20 seconds to import
def test_compiled_networks_are_refused() -> None:
    given = network("sd")
    given.mid_block.compile()
    with pytest.raises(ModelError, match="compiled"):
        memory_layers(given)
    with pytest.raises(ModelError, match="compiled"):
        memory_layers(torch.compile(network("sd3")))


def test_fused_projections_are_refused_only_where_they_matter() -> None:
    given = network("sd3")
    for block in given.transformer_blocks:
        block.attn.fuse_projections()
    with pytest.raises(ModelError, match="unfuse_qkv_projections"):
        memory_layers(given, "cross_value")
    assert memory_layers(given, "ffn_out")


def test_layers_with_a_lora_are_refused() -> None:
    from peft import LoraConfig

    given = network("sd")
    given.add_adapter(LoraConfig(target_modules=["ff.net.2"], r=2))
    with pytest.raises(ModelError, match="LoRA"):
        memory_layers(given)


def test_quantised_and_offloaded_weights_are_refused() -> None:
    given = network("sd")
    layer = given.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    integers = torch.zeros(layer.weight.shape, dtype=torch.int8)
    layer.weight = torch.nn.Parameter(integers, requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        memory_layers(given)
    with pytest.raises(ModelError, match="offloaded"):
        memory_layers(network("sd").to("meta"))
