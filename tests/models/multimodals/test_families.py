"""Parts, visual tokens and visual features of every supported family."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import family_of, supported
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param)).eval()


def batch(*pictures: list[Tensor], question: str = "what is this ?") -> dict[str, Any]:
    return {
        "images": list(pictures),
        "question": [question] * len(pictures),
        "answer": ["anna"] * len(pictures),
        "label": torch.zeros(len(pictures), dtype=torch.int64),
        "id": torch.arange(len(pictures)),
        "weight": torch.ones(len(pictures)),
    }


def test_every_parameter_has_a_part(model: MultimodalLM) -> None:
    family, network = model.family, model.network
    parts = {name: family.part(name) for name, _ in network.named_parameters()}
    assert {"vision", "projector", "language"} <= set(parts.values()) and "other" not in parts
    assert "other" not in parts.values()
    projector = {id(p) for p in family.projector_of(network).parameters()}
    for name, parameter in network.named_parameters():
        assert (parts[name] == "projector") == (id(parameter) in projector), name


def test_blocks_are_numbered_by_tower(model: MultimodalLM) -> None:
    family, network = model.family, model.network
    layers, blocks = family.layers(network), family.vision_blocks(network)
    assert (len(layers), len(blocks)) == (3, 2)
    owner = {id(p): ("language", n) for n, layer in enumerate(layers) for p in layer.parameters()}
    owner |= {id(p): ("vision", n) for n, block in enumerate(blocks) for p in block.parameters()}
    for name, parameter in network.named_parameters():
        assert family.block(name) == owner.get(id(parameter)), name


@torch.no_grad()
def test_features_are_those_that_the_network_uses(model: MultimodalLM) -> None:
    one, two, three = tiny_pictures(3)
    inputs = model.inputs(batch([one], [], [two, three]), answers=False)
    found = model.family.encode_images(model.network, inputs, layers=[0, -1])
    assert [len(feature) for feature in found.pooled] == [16, 16, 16]
    assert found.grid == [(4, 4)] * 3
    counts = [len(feature) for feature in found.pooled]
    assert model.family.pictures_per_row(model.network, inputs, counts) == [1, 0, 2]

    seen: list[Tensor] = []
    decoder = model.family.language_model(model.network)
    handle = decoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model.network(**inputs)
    finally:
        handle.remove()
    visual = model.family.visual_mask(model.network, inputs["input_ids"])
    assert torch.allclose(seen[0][visual], torch.cat(found.pooled), atol=1e-6)


@torch.no_grad()
def test_states_of_the_tower_lie_where_their_patches_lie(model: MultimodalLM) -> None:
    """A change of one corner of the picture changes the states of that corner most."""
    picture = tiny_pictures(1)[0]
    other = picture.clone()
    other[:, :4, 28:] = 255 - other[:, :4, 28:]  # the corner at the top right
    states, grid = [], (0, 0)
    for shown in (picture, other):
        inputs = model.inputs(batch([shown]), answers=False)
        found = model.family.encode_images(model.network, inputs, layers=[0])
        states.append(found.levels[0][0])
        grid = found.raw_grid[0]
    assert states[0].shape[0] == grid[0] * grid[1]
    change = (states[0] - states[1]).norm(dim=1).reshape(grid)
    assert int(change.argmax()) == grid[1] - 1, change


@torch.no_grad()
def test_several_pictures_reach_the_network_in_order(model: MultimodalLM) -> None:
    one, two = tiny_pictures(2)
    loss = model.loss(batch([one, two], [two, one], [one, one]))
    assert torch.unique(loss).numel() == 3
    again = model.loss(batch([two, one], [one, two], [one, one]))
    assert torch.allclose(loss[[1, 0, 2]], again, atol=1e-5)


def test_placeholders_without_pictures_are_refused(model: MultimodalLM) -> None:
    inputs = dict(model.inputs(batch([tiny_pictures(1)[0]]), answers=False))
    del inputs["pixel_values"]
    with pytest.raises(DataError, match="row 0 of the batch has placeholders"):
        model.family.check_images(model.network, inputs)
    with pytest.raises(DataError, match="holds no picture"):
        model.family.encode_images(model.network, inputs)


def test_pictures_and_placeholders_must_agree() -> None:
    network, processor = tiny_multimodal("llava")
    model = MultimodalLM(network, processor)
    inputs = model.inputs(batch([tiny_pictures(1)[0]]), answers=False)
    for counts, message in (([10], "16 placeholders"), ([16, 16], "2 pictures")):
        with pytest.raises(DataError, match=message):
            model.family.pictures_per_row(network, inputs, counts)


def test_tiles_of_large_pictures() -> None:
    """Idefics3 cuts large pictures: every tile gives its own tokens."""
    network, processor = tiny_multimodal("idefics3")
    processor.image_processor.size = {"longest_edge": 64}
    processor.image_processor.do_image_splitting = True
    tokens = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    processor.tokenizer.add_tokens(tokens, special_tokens=True)
    network.resize_token_embeddings(len(processor.tokenizer))
    model = MultimodalLM(network, processor).eval()
    large = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    inputs = model.inputs(batch([large], [tiny_pictures(1)[0]]), answers=False)
    found = model.family.encode_images(network, inputs)
    counts = [len(feature) for feature in found.pooled]
    assert set(counts) == {16} and len(counts) >= 6
    assert sum(model.family.pictures_per_row(network, inputs, counts)) == len(counts)
    assert torch.isfinite(model.loss(batch([large], [tiny_pictures(1)[0]]))).all()


def test_a_network_within_peft_is_recognised() -> None:
    from peft import LoraConfig, get_peft_model

    network, processor = tiny_multimodal("qwen2_vl")
    model = MultimodalLM(network, processor)
    names = [site.name for site in model.sites("attention")]
    wrapped = get_peft_model(network, LoraConfig(target_modules=names, r=2))
    assert family_of(wrapped) is not None and type(family_of(wrapped)) is type(model.family)
    inside = MultimodalLM(wrapped, processor).eval()
    assert torch.isfinite(inside.loss(batch([tiny_pictures(1)[0]]))).all()
    assert len(inside.answer([[tiny_pictures(1)[0]]], ["who is this ?"], 2)) == 1


def test_adapters_never_land_in_the_tower_by_accident(model: MultimodalLM) -> None:
    for kind in ("ffn", "attention", "all"):
        sites = model.sites(kind)  # type: ignore[arg-type]
        assert sites and all(model.family.part(site.name) == "language" for site in sites)
    assert {site.block for site in model.sites("ffn")} == {
        f"{model.family.language}.layers.{n}" for n in range(3)
    }
    both = MultimodalLM(model.network, model.processor, adapted=("language", "vision"))
    assert {model.family.part(site.name) for site in both.sites("ffn")} == {"language", "vision"}
    alone = MultimodalLM(model.network, model.processor, adapted=("head",))
    with pytest.raises(ConfigurationError, match="`adapted`"):
        alone.sites("ffn")


def test_other_networks_are_named_with_the_supported_ones() -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=8, image_size=8, patch_size=4)  # fmt: skip
    for network in (ViTModel(config), nn.Linear(1, 1)):
        with pytest.raises(CapabilityError, match="supported are: llava, qwen2_vl"):
            family_of(network)
    assert "internvl" in supported()
