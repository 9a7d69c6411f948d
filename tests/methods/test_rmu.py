"""RMU: the direction, the layer, the places, what is trained."""

from __future__ import annotations

import pytest
import torch

from mmforget.errors import ConfigurationError
from mmforget.methods import RMU
from mmforget.models.multimodal import MultimodalLM
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.named_patterns import WORDS, named_patterns
from mmforget.testing.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def shared() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava", WORDS)).eval()


def streams():
    data = named_patterns()
    forget, retain = (data.subset("train", role) for role in ("forget", "retain"))
    # of several lengths, some without picture
    return {"forget": forget[[0, 1]], "retain": retain[[0, 1, len(retain) - 1]]}


def states(model: MultimodalLM, batch, layer: int) -> list[torch.Tensor]:
    """Per row the states of a layer from which the labelled tokens are predicted."""
    inputs = model.inputs(batch)
    labels = inputs.pop("labels")
    output = model.network(**inputs, output_hidden_states=True)
    hidden = output.hidden_states[layer + 1]  # the first one is the embedding
    return [h[:-1][row[1:] != -100] for h, row in zip(hidden, labels, strict=True)]


def test_distances_by_hand(shared):
    method = RMU(shared, layer=1, coefficient=3.0, retain_weight=2.0)
    batch = streams()
    start = method.losses(batch)
    gone = torch.cat(states(shared, batch["forget"], 1))
    expected = (gone - 3.0 * method.direction).square().mean(-1).mean()
    torch.testing.assert_close(start["forget"], expected, rtol=1e-4, atol=1e-5)
    assert start["retain"].item() == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        for site in method._written:
            site.module.weight.mul_(1.1)
    kept, new = (torch.cat(states(m, batch["retain"], 1)) for m in (shared, method.model))
    expected = 2.0 * (new - kept).square().mean(-1).mean()
    torch.testing.assert_close(method.losses(batch)["retain"], expected, rtol=1e-4, atol=1e-5)


def test_the_direction_is_one_unit_vector_of_the_seed(shared):
    one, same, other = RMU(shared), RMU(shared), RMU(shared, seed=1)
    assert one.direction.norm().item() == pytest.approx(1.0)
    assert torch.equal(one.direction, same.direction)
    assert not torch.allclose(one.direction, other.direction, atol=0.1)
    assert "direction" in one.state_dict()


@pytest.mark.parametrize(
    ("layer", "blocks"), [(None, [0, 1]), (2, [0, 1, 2]), (-1, [0, 1, 2]), (0, [0])]
)
def test_only_the_last_projections_of_three_layers_are_trained(shared, layer, blocks):
    method = RMU(shared, layer=layer)
    trained = [n for n, p in method.model.network.named_parameters() if p.requires_grad]
    assert trained == [f"model.language_model.layers.{b}.mlp.down_proj.weight" for b in blocks]
    assert method.block == f"model.language_model.layers.{blocks[-1]}"
    assert method.statistics()["layer"] == method.block
    # the copy for reference holds these and no others
    assert len(list(method.reference.buffers())) == len(blocks)


def test_whole_layers_may_be_trained(shared):
    method = RMU(shared, layer=1, weights="layers")
    trained = {n for n, p in method.model.network.named_parameters() if p.requires_grad}
    inside = [
        n for n, _ in method.model.network.named_parameters() if "language_model.layers." in n
    ]
    assert trained == {n for n in inside if ".layers.2." not in n}


def test_no_hook_is_left(shared):
    method = RMU(shared, lr=1e-3)
    quiet_trainer(max_epochs=1).fit(method, datamodule=named_patterns(view="paired"))
    hooks = [h for m in method.finalize().modules() for h in m._forward_hooks.values()]
    assert not any(hook.__module__.startswith("mmforget") for hook in hooks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, r"`layer` is 3, but there are 3 layers; .* 0 to 2"),
        ({"coefficient": 0.0}, "`coefficient` is 0.0"),
        ({"weights": "layer"}, "did you mean 'layers'"),
    ],
)
def test_bad_settings(shared, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        RMU(shared, **settings)
