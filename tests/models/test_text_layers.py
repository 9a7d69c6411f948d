"""Which layers are selected in each family, and that nothing is ever selected by name alone."""

from __future__ import annotations

from typing import Any, get_args

import diffusers
import pytest
import torch
from torch import nn

from mmforget.errors import CapabilityError, ModelError
from mmforget.models import text_layers
from mmforget.models.base import Site, TextLayer
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.text_layers import Family, chosen, family_of, in_stages
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

UNET_BLOCKS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
)
UNET_TEXT = [
    (f"{block}.{part}", "states", 32) for block in UNET_BLOCKS for part in ("to_k", "to_v")
]
JOINT_TEXT = [
    ("time_text_embed.text_embedder.linear_1", "pooled", 32),
    ("context_embedder", "states", 32),
]
TEXT = {
    "sd": UNET_TEXT,
    "sd2": UNET_TEXT,
    "sdxl": [("add_embedding.linear_1", "pooled", 16), *UNET_TEXT],
    "sd3": JOINT_TEXT,
    "sd35": JOINT_TEXT,
    "flux": JOINT_TEXT,
}
UNET_CROSS = [
    f"{block}.{part}" for block in UNET_BLOCKS for part in ("to_q", "to_k", "to_v", "to_out.0")
]
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
JOINT_CROSS = [f"transformer_blocks.{block}.attn.{part}" for block in (0, 1) for part in ADDED]
CROSS = {
    "sd": UNET_CROSS,
    "sd2": UNET_CROSS,
    "sdxl": UNET_CROSS,
    "sd3": JOINT_CROSS[:-1],  # the last block has no output for text
    "sd35": JOINT_CROSS[:-1],
    "flux": JOINT_CROSS,
}
KINDS = get_args(TinyKind)


@pytest.mark.parametrize("kind", KINDS)
def test_selections(kind: TinyKind) -> None:
    model = DiffusionGenerator(tiny_pipeline(kind))
    assert [(x.name, x.reads, x.columns) for x in model.text_layers()] == TEXT[kind]
    assert [site.name for site in model.sites("cross_attention")] == CROSS[kind]
    assert [site.name for site in model.sites("text_reading")] == [name for name, *_ in TEXT[kind]]
    for layer in model.text_layers():
        assert model.network.get_submodule(layer.name) is layer.module
        assert isinstance(layer.module, nn.Linear)
    for sort in ("ffn", "attention", "all"):
        names = [site.name for site in model.sites(sort)]
        weights = [model.network.get_submodule(name) for name in names]
        assert all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in weights)
        if sort == "all":
            every = [m for m in model.network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            assert {id(m) for m in every} == {id(m) for m in weights}
        else:
            assert 0 < len(names) == len(set(names)) < len(model.sites("all"))
            assert all((".ff" in name) == (sort == "ffn") for name in names)


def test_widths_are_those_that_encode_returns() -> None:
    for kind in KINDS:
        model = DiffusionGenerator(tiny_pipeline(kind))
        embedding = model.encode(["a red cat"])
        for layer in model.text_layers():
            rows = embedding.states if layer.reads == "states" else embedding.pooled
            assert rows is not None and rows.shape[-1] == layer.columns


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_functions_of_the_prompt_alone(kind: TinyKind) -> None:
    """The same rows for other noise and another time; and the layers come in forward order."""
    model = DiffusionGenerator(tiny_pipeline(kind))
    embedding, seen = model.encode(["a red cat"]), list[tuple[str, torch.Tensor]]()
    for layer in model.text_layers():

        def hook(part: Any, given: Any, out: Any, layer: TextLayer = layer) -> None:
            seen.append((layer.name, given[0][..., : layer.columns].reshape(-1, layer.columns)))

        layer.module.register_forward_hook(hook)
    with torch.no_grad():
        for time in (3, 900):
            noisy = torch.full((1, *model.latent_shape), float(time))
            model.predict(noisy, torch.tensor(float(time)), embedding)
    half = len(seen) // 2
    assert [name for name, _ in seen[:half]] == [layer.name for layer in model.text_layers()]
    for (name, one), (_, other), layer in zip(
        seen[:half], seen[half:], model.text_layers(), strict=True
    ):
        rows = embedding.states if layer.reads == "states" else embedding.pooled
        assert torch.equal(one, other), name
        assert torch.equal(one, rows.reshape(-1, layer.columns)), name


def test_dual_attention_is_no_cross_attention() -> None:
    """SD3.5 has an ``attn2`` that attends to the picture itself."""
    model = DiffusionGenerator(tiny_pipeline("sd35"))
    assert any(".attn2." in name for name, _ in model.network.named_modules())
    for kind in ("cross_attention", "text_reading"):
        assert not any("attn2" in site.name for site in model.sites(kind))
    assert any("attn2" in site.name for site in model.sites("attention"))


def test_self_attention_as_wide_as_the_text() -> None:
    """In the tiny UNets some ``attn1`` have the width of the text; they are not selected."""
    model = DiffusionGenerator(tiny_pipeline("sd"))
    same = [
        name
        for name, module in model.network.named_modules()
        if name.endswith("attn1.to_k") and module.in_features == 32
    ]
    assert same
    assert not {site.name for site in model.sites("cross_attention")} & set(same)


def test_blocks_of_another_name() -> None:
    """Public code looks for 'Cross' in class names and misses custom blocks."""
    network = tiny_pipeline("sd").unet
    for module in network.modules():
        if "Cross" in type(module).__name__:
            module.__class__ = type("Mine", (type(module),), {})
    family = family_of(network)
    assert [layer.name for layer in family.text_layers(network)] == [n for n, *_ in UNET_TEXT]


def plain_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=32,
    )


def test_networks_without_text() -> None:
    pipe = tiny_pipeline("sd")
    pipe.unet = plain_unet()
    with pytest.raises(CapabilityError, match="UNet2DConditionModel has no layer that reads text"):
        DiffusionGenerator(pipe)


def test_networks_that_project_their_text_first() -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    model.network.register_to_config(encoder_hid_dim_type="text_proj")
    with pytest.raises(ModelError, match="projects its text first"):
        model.text_layers()
    model.network.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ModelError, match=r"has an IP-Adapter; .*`pipe.unload_ip_adapter\(\)`"):
        model.text_layers()


def test_weights_that_cannot_be_edited() -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    first = model.text_layers()[0]
    weight = first.module.weight
    first.module.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"attn2.to_k' are quantised \(Linear, torch.int8\); load"):
        model.text_layers()
    first.module.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
    with pytest.raises(ModelError, match=r"attn2.to_k' are offloaded; load"):
        model.text_layers()
    first.module.weight = weight
    assert len(model.text_layers()) == 8


class _Reader(nn.Module):
    """A denoiser that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(32, 4)


def test_other_denoisers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _Reader()
    message = (
        "the denoiser is a _Reader, but text layers are known for FluxTransformer2DModel, "
        "SD3Transformer2DModel, UNet2DConditionModel; append a `Family`"
    )
    with pytest.raises(ModelError, match=message):
        family_of(network)
    monkeypatch.setattr(text_layers, "FAMILIES", list(text_layers.FAMILIES))
    mine = Family(
        "Mine",
        "_Reader",
        "transformer",
        lambda net: [TextLayer("read", net.read, "states", 32)],
        lambda net: [Site("read", net.read, "read")],
    )
    text_layers.FAMILIES.append(mine)
    assert family_of(network) is mine
    assert chosen(mine.text_layers(network), network)[0].module is network.read


@pytest.mark.slow  # the compiler takes seconds to import
def test_compiled_denoisers() -> None:
    with pytest.raises(
        ModelError, match=r"is compiled \(OptimizedModule\); give the pipeline befo"
    ):
        family_of(torch.compile(_Reader()))


def test_families_of_unets() -> None:
    assert family_of(tiny_pipeline("sd2").unet).name == "Stable Diffusion"
    assert family_of(tiny_pipeline("sdxl").unet).name == "SDXL"


def test_stages() -> None:
    names = ["conv_in", "time_embedding.x", "down_blocks.1", "up_blocks.0", "mid_block", "conv_out"]
    found = [name for name, _ in in_stages([(name, nn.Identity()) for name in names])]
    assert found == [*names[:3], "mid_block", "up_blocks.0", "conv_out"]
