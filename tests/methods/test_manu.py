"""MANU: what is summed over which tokens, the score by hand, and which columns go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.errors import CapabilityError, ConfigurationError, NoOpError
from mmforget.methods import MANU
from mmforget.methods.manu import (
    ABSOLUTE,
    ACTIVE,
    FORGET,
    PICTURE,
    RETAIN,
    SQUARES,
    SUM,
    TEXT,
    importance,
)
from mmforget.models.multimodal import MultimodalLM
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.named_patterns import WORDS, named_patterns
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures


@pytest.fixture(scope="module")
def shared() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava", WORDS)).eval()


@pytest.fixture(scope="module")
def heard(shared: MultimodalLM) -> MANU:
    """A method after its pass over the data."""
    method = MANU(shared, share=0.1)
    quiet_trainer(max_epochs=1).fit(method, datamodule=named_patterns(view="statistics"))
    return method


def records(pictures: list[list[Tensor]]) -> dict[str, object]:
    """Three records of unequal length: two of the forget set, the last only padding of it."""
    return {
        "images": pictures,
        "question": ["who is this ?", "who is this person shown there ?", "who ?"],
        "answer": ["anna", "bert", "clara"],
        "weight": torch.tensor([1.0, 1.0, 0.0]),
        "forget": torch.tensor([True, False, True]),
    }


def test_importance_worked_out_by_hand():
    # one neuron: -1, 3 with pictures and 1, 1, 1, 1 without
    sums = torch.zeros(2, 4, 1, dtype=torch.float64)
    sums[PICTURE, :, 0] = torch.tensor([4.0, 2.0, 10.0, 2.0])
    sums[TEXT, :, 0] = torch.tensor([4.0, 4.0, 4.0, 4.0])
    found = importance(sums, torch.tensor([2.0, 4.0], dtype=torch.float64))
    # sizes 2 and 1, activity 1 and 1, variances 4 and 0, squares 5 and 1
    expected = 1 / 3 + 0.0 + np.sqrt(4.0) + np.sqrt(4 / 6)
    assert found.tolist() == pytest.approx([expected], rel=1e-6)
    assert (ABSOLUTE, SUM, SQUARES, ACTIVE) == (0, 1, 2, 3)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "smolvlm", "internvl"])
def test_sums_equal_those_of_each_record_alone(kind: TinyMultimodalKind):
    model = MultimodalLM(*tiny_multimodal(kind, WORDS)).eval()
    pictures = [[one] for one in tiny_pictures(3)]
    method = MANU(model)
    method.accumulate(records(pictures))
    # of one record, whose tokens need no padding
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, args, name=name: seen.update({name: args[0].double().flatten(0, -2)})
        )
        for name, layer in model_layers(method, model).items()
    ]
    try:
        for role, row in ((FORGET, 0), (RETAIN, 1)):
            for modality in (PICTURE, TEXT):
                one = {
                    "images": [pictures[row] if modality == PICTURE else []],
                    "question": [records(pictures)["question"][row]],  # type: ignore[index]
                    "answer": [records(pictures)["answer"][row]],  # type: ignore[index]
                }
                seen.clear()
                with torch.no_grad():
                    model.answer_logits(one)
                first = 0
                for number, (name, layer) in enumerate(method.layers.items()):
                    own = method.sums[role, modality, :, first : first + layer.in_features]
                    first += layer.in_features
                    if name not in seen:  # the tower, without a picture
                        assert modality == TEXT and method.tokens[role, modality, number] == 0
                        continue
                    values = seen[name]
                    assert method.tokens[role, modality, number] == len(values)
                    expected = torch.stack(
                        [
                            values.abs().sum(0),
                            values.sum(0),
                            values.square().sum(0),
                            (values.abs() > 0.1).double().sum(0),
                        ]
                    )
                    torch.testing.assert_close(own[:3], expected[:3], rtol=1e-4, atol=1e-3)
                    assert (own[3] - expected[3]).abs().max() <= 1  # rounding at the threshold
    finally:
        for handle in handles:
            handle.remove()
    assert method.cost()["sample_passes"] == 4.0


def model_layers(method: MANU, model: MultimodalLM) -> dict[str, torch.nn.Module]:
    return {name: model.network.get_submodule(name) for name in method.layers}


def test_the_last_layer_of_every_block_is_watched(shared):
    names = list(MANU(shared).layers)
    assert names == [
        *(f"model.vision_tower.encoder.layers.{n}.mlp.fc2" for n in range(2)),
        *(f"model.language_model.layers.{n}.mlp.down_proj" for n in range(3)),
    ]
    assert len(MANU(shared, parts=["language"]).layers) == 3


@pytest.mark.parametrize("across", ["part", "layer"])
def test_the_columns_of_the_highest_scores_go(heard, shared, across):
    method = MANU(shared, share=0.1, across=across)
    method.sums.copy_(heard.sums)
    method.tokens.copy_(heard.tokens)
    scores = method.scores()
    given = {name: layer.weight.clone() for name, layer in method.layers.items()}
    others = {
        name: value.clone()
        for name, value in shared.network.state_dict().items()
        if name.removesuffix(".weight") not in given
    }
    result = method.finalize()
    state = result.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in others.items())
    gone = {name: (method.layers[name].weight == 0).all(0) for name in given}
    for name, weight in given.items():
        assert torch.equal(method.layers[name].weight[:, ~gone[name]], weight[:, ~gone[name]])
    vision = [name for name in given if "vision" in name]
    groups = [[name] for name in given] if across == "layer" else [
        vision, [name for name in given if name not in vision]
    ]  # fmt: skip
    for names in groups:
        mask = torch.cat([gone[name] for name in names])
        together = torch.cat([scores[name] for name in names])
        assert int(mask.sum()) == int(0.1 * len(mask))
        assert together[mask].min() >= together[~mask].max()
    report = method.statistics()
    assert sum(report["removed_neurons"].values()) == sum(int(m.sum()) for m in gone.values())


def test_data_without_pictures_are_heard_as_text(shared):
    method = MANU(shared, parts=["language"])
    method.accumulate(records([[], [], []]))
    assert (method.tokens[:, PICTURE] == 0).all() and (method.tokens[:, TEXT] > 0).all()
    assert all(torch.isfinite(found).all() for found in method.scores().values())


def test_settings_without_meaning(shared):
    for settings, message in (
        ({"share": 0.0}, "`share` is 0"),
        ({"threshold": -1.0}, "`threshold` is -1"),
        ({"across": "layers"}, "'layers', did you mean 'layer'"),
        ({"parts": []}, "`parts` is"),
        ({"parts": ["projector"]}, "name 'language', 'vision' or both"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            MANU(shared, **settings)
    with pytest.raises(CapabilityError, match="MANU needs Answers"):
        MANU(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="needs both"):
        MANU(shared).finalize()
    assert MANU.access == DataAccess(retain="statistics")


def test_a_share_below_one_neuron(heard, shared):
    method = MANU(shared, share=0.001)
    method.sums.copy_(heard.sums)
    method.tokens.copy_(heard.tokens)
    with pytest.raises(NoOpError, match="has 64"):
        method.finalize()
