"""The layers of each kind, for every library and naming that we promise."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.models.classifier import ImageClassifier
from mmforget.models.ffn_sites import find_sites

VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 2),
    "num_heads": (1, 2),
}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}
HF_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def from_timm(name: str, **args: object) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=5, **args)


def from_torchvision(kind: type[nn.Module], **args: object) -> Callable[[], nn.Module]:
    return functools.partial(kind, num_classes=5, **args)


def from_transformers(name: str, **args: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = transformers.AutoConfig.for_model(name, num_labels=5, **args)
        kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        return (kind[0] if isinstance(kind, tuple) else kind)(config)

    return build


class LinearPair(nn.Module):
    """The torch encoder layer: `linear1` and `linear2` in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, dim_feedforward=24) for _ in range(2)
        )
        self.head = nn.Linear(16, 5)


class OldTransformersBlock(nn.Module):
    """The tree of transformers 4: `output.dense` occurs in attention, too."""

    def __init__(self) -> None:
        super().__init__()
        dense = functools.partial(nn.ModuleDict)
        inner = nn.ModuleDict({k: nn.Linear(8, 8) for k in ("query", "key", "value")})
        attention = nn.ModuleDict({"attention": inner, "output": dense({"dense": nn.Linear(8, 8)})})
        self.layer = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        "attention": attention,
                        "intermediate": dense({"dense": nn.Linear(8, 16)}),
                        "output": dense({"dense": nn.Linear(16, 8)}),
                    }
                )
            ]
        )
        self.classifier = nn.Linear(8, 5)


# label, builder, ffn layers per block, blocks, attention layers per block (None: no attention)
TABLE = [
    ("timm ViT", from_timm("vit_tiny_patch16_224", **VIT), 2, 2, 2),
    ("timm DeiT", from_timm("deit_tiny_patch16_224", **VIT), 2, 2, 2),
    ("timm distilled DeiT", from_timm("deit_tiny_distilled_patch16_224", **VIT), 2, 2, 2),
    ("timm Swin", from_timm("swin_tiny_patch4_window7_224", **SWIN), 2, 3, 2),
    ("timm EVA, plain", from_timm("eva_giant_patch14_224", **VIT), 2, 2, 2),
    ("timm EVA-02, fused SwiGLU", from_timm("eva02_tiny_patch14_224", **VIT), 2, 2, 2),
    ("timm EVA-02, SwiGLU", from_timm("eva02_base_patch14_224", **VIT), 3, 2, 4),
    ("timm DINOv2 SwiGLU", from_timm("vit_giant_patch14_reg4_dinov2", **VIT), 2, 2, 2),
    ("timm ConvNeXt, linear", from_timm("convnext_tiny", conv_mlp=False, **CONVNEXT), 2, 5, None),
    ("timm ConvNeXt, 1x1", from_timm("convnext_tiny", conv_mlp=True, **CONVNEXT), 2, 5, None),
    ("timm ConvNeXt v2", from_timm("convnextv2_atto", **CONVNEXT), 2, 5, None),
    ("timm MaxViT", from_timm("test_maxvit"), 2, 8, 2),
    (
        "torchvision ViT",
        from_torchvision(
            torchvision.models.VisionTransformer,
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
        ),
        2,
        2,
        None,  # nn.MultiheadAttention has no projection layers that are called
    ),
    (
        "torchvision Swin",
        from_torchvision(
            torchvision.models.SwinTransformer,
            patch_size=[2, 2],
            embed_dim=8,
            depths=[1, 2],
            num_heads=[1, 2],
            window_size=[4, 4],
        ),
        2,
        3,
        2,
    ),
    (
        "torchvision ConvNeXt",
        from_torchvision(
            torchvision.models.ConvNeXt,
            block_setting=[
                torchvision.models.convnext.CNBlockConfig(8, 16, 1),
                torchvision.models.convnext.CNBlockConfig(16, None, 2),
            ],
        ),
        2,
        3,
        None,
    ),
    ("transformers ViT", from_transformers("vit", **HF_VIT), 2, 2, 4),
    ("transformers DeiT", from_transformers("deit", **HF_VIT), 2, 2, 4),
    ("transformers BEiT", from_transformers("beit", **HF_VIT), 2, 2, 4),
    ("transformers DINOv2", from_transformers("dinov2", **HF_VIT, use_swiglu_ffn=True), 3, 2, 4),
    (
        "transformers Swin",
        from_transformers(
            "swin",
            image_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=8,
            depths=[1, 2],
            num_heads=[1, 2],
        ),
        2,
        3,
        4,
    ),
    (
        "transformers ConvNeXt",
        from_transformers("convnext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1]),
        2,
        5,
        None,
    ),
    ("transformers 4 ViT", OldTransformersBlock, 2, 1, 4),
    ("torch encoder layer", LinearPair, 2, 2, None),
]


@pytest.mark.parametrize(
    ("build", "per_block", "blocks", "attention"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_layers_per_block(
    build: Callable[[], nn.Module], per_block: int, blocks: int, attention: int | None
) -> None:
    network = build()
    heads = [name for name, _ in network.named_modules() if name in ("head", "classifier")]
    sites = find_sites(network, "ffn", heads)
    counts = Counter(site.block for site in sites)
    assert len(counts) == blocks
    assert set(counts.values()) == {per_block}
    assert len({site.name for site in sites}) == len(sites)
    order = list(dict.fromkeys(site.block for site in sites))
    assert [s.block for s in sites] == [b for b in order for _ in range(per_block)]  # neighbours
    for site in sites:
        assert network.get_submodule(site.name) is site.module
        assert site.name.startswith(site.block + ".")
        assert isinstance(site.module, nn.Linear | nn.Conv2d)
    # the last layer of a block undoes the widening of the first, so that they are one FFN
    for block in order:
        shapes = [site.module.weight.shape for site in sites if site.block == block]
        assert shapes[0][1] == shapes[-1][0]
    if attention is None:
        with pytest.raises(CapabilityError, match="no sites of kind 'attention'"):
            find_sites(network, "attention", heads)
    else:
        found = find_sites(network, "attention", heads)
        assert set(Counter(site.block for site in found).values()) == {attention}
        assert not {site.name for site in found} & {site.name for site in sites}
        assert {site.block for site in found} == set(order)


def test_all_layers_but_the_head() -> None:
    model = ImageClassifier(
        "vit_tiny_patch16_224", num_classes=5, network_args={**VIT, "embed_dim": 32}
    )
    expected = [
        name
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name != "head"
    ]
    sites = model.sites("all")
    assert [site.name for site in sites] == expected
    blocks = {site.name: site.block for site in sites}
    assert blocks["blocks.1.attn.qkv"] == blocks["blocks.1.mlp.fc2"] == "blocks.1"
    assert blocks["patch_embed.proj"] == "patch_embed"


def test_a_network_without_blocks() -> None:
    model = ImageClassifier("resnet18", num_classes=5, library="torchvision")
    with pytest.raises(CapabilityError, match="ResNet has no sites of kind 'ffn': looked for"):
        model.sites("ffn")
    sites = model.sites("all")
    assert len(sites) == 20
    assert {s.block for s in sites if s.name.startswith("layer1.0.")} == {"layer1.0"}


def test_squeeze_and_excitation_is_no_attention() -> None:
    network = timm.create_model("test_byobnet", num_classes=5)
    assert any(name.endswith("attn.fc1") for name, _ in network.named_modules())
    with pytest.raises(CapabilityError):
        find_sites(network, "attention", ["head.fc"])


def test_unknown_kind() -> None:
    with pytest.raises(ConfigurationError, match="unknown kind of site 'fnn', did you mean 'ffn'"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), "fnn", [])  # type: ignore[arg-type]


@pytest.mark.parametrize("label", ["torchvision ViT", "timm EVA-02, SwiGLU", "transformers DINOv2"])
def test_every_site_takes_part_in_the_forward_pass(label: str) -> None:
    """A layer whose weight is read elsewhere, as in nn.MultiheadAttention, must not be a site."""
    network = {row[0]: row[1] for row in TABLE}[label]()
    size = 28 if label.startswith("timm") else 32
    called: set[str] = set()
    sites = find_sites(network, "all", ["head", "classifier", "heads.head"])
    for site in sites:
        site.module.register_forward_hook(lambda *_, name=site.name: called.add(name))
    network(torch.rand(1, 3, size, size))
    assert called == {site.name for site in sites}
