"""Attention mass on visual tokens, against numbers by hand and eager attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.visual_attention import VisualAttention, visual_mass
from mmforget.metrics.visual_evidence import visual_evidence
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.attention_tap import Seen
from mmforget.retention.a2sf import A2SF
from mmforget.retention.kv_eviction import KVEviction
from mmforget.testing.tiny_multimodal import tiny_multimodal, tiny_pictures


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param)).eval()


@pytest.fixture(scope="module")
def llava() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava")).eval()


def inputs_of(model: MultimodalLM) -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    questions = ["what digit is this ?", "which name ?", "look again , what are the names ?"]
    batch = {"images": [[one], [], [two, three]], "question": questions}
    return model.family.model_inputs(model.inputs(batch, padding="left", answers=False))


# ---- by hand ------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([[[[0.5, 0.2, 0.2, 0.1]], [[0.1, 0.3, 0.4, 0.2]]]])  # two heads
VISUAL = torch.tensor([[False, True, True]])  # the fourth token is generated text
ALL = torch.ones(1, 1, 1, 4, dtype=torch.bool)


def test_mass_by_hand() -> None:
    found = visual_mass(Seen(0, WEIGHTS, ALL), VISUAL)
    assert found.mass.item() == pytest.approx((0.4 + 0.7) / 2)
    assert found.normalised.item() == pytest.approx(0.55 / (2 / 4))
    assert found.defined.all()


def test_mass_without_the_first_token() -> None:
    found = visual_mass(Seen(0, WEIGHTS, ALL), VISUAL, torch.tensor([0]))
    mass = (0.4 / 0.5 + 0.7 / 0.9) / 2
    assert found.mass.item() == pytest.approx(mass)
    assert found.normalised.item() == pytest.approx(mass / (2 / 3))
    found = visual_mass(Seen(0, WEIGHTS, ALL), VISUAL, torch.tensor([1]))  # it is visual itself
    mass = (0.2 / 0.8 + 0.4 / 0.7) / 2
    assert found.mass.item() == pytest.approx(mass)
    assert found.normalised.item() == pytest.approx(mass / (1 / 3))


def test_keys_that_are_gone_do_not_count() -> None:
    visible = torch.tensor([[[[True, False, True, True]], [[True, True, True, True]]]])
    weights = torch.tensor([[[[0.6, 0.0, 0.3, 0.1]], [[0.1, 0.3, 0.4, 0.2]]]])
    found = visual_mass(Seen(0, weights, visible), VISUAL)
    assert found.mass.item() == pytest.approx((0.3 + 0.7) / 2)
    assert found.normalised.item() == pytest.approx(0.5 / ((1 / 3 + 2 / 4) / 2))


def test_uniform_attention_is_one_and_undefined_rows_say_so() -> None:
    even = torch.full((1, 2, 1, 4), 0.25)
    assert visual_mass(Seen(0, even, ALL), VISUAL).normalised.item() == pytest.approx(1)
    text = visual_mass(Seen(0, even, ALL), torch.zeros(1, 3, dtype=torch.bool))
    padding = visual_mass(Seen(0, even * 0, ~ALL), VISUAL)
    for found in (text, padding):
        assert not found.defined.any() and found.normalised.isfinite().all()
        assert found.mass.item() == 0
    with pytest.raises(DataError, match="layer 0 attends to 4 tokens, but `visual` covers 9"):
        visual_mass(Seen(0, even, ALL), torch.zeros(1, 9, dtype=torch.bool))


def test_means_and_slope() -> None:
    metric = VisualAttention(layers=2, tokens=3)
    mass = torch.tensor([[[0.4, 0.2, 0.9], [0.8, 0.6, 0.9]], [[0.6, 0.9, 0.9], [0.2, 0.9, 0.9]]])
    counted = torch.tensor([[[True, True, False]] * 2, [[True, False, False]] * 2])
    nothing = torch.zeros(1, 2, 3)
    metric.update(mass, mass * 2, counted)
    metric.update(nothing, nothing, nothing.bool())
    found = metric.compute()
    assert found.table[0] == [pytest.approx(0.5), pytest.approx(0.2), None]
    assert found.normalised_table[1] == [pytest.approx(1.0), pytest.approx(1.2), None]
    assert found.by_layer == pytest.approx([(0.4 + 0.2 + 0.6) / 3, (0.8 + 0.6 + 0.2) / 3])
    assert found.by_token[:2] == pytest.approx([0.5, 0.4]) and found.by_token[2] is None
    assert found.slope == pytest.approx(-0.1)
    assert found.value == pytest.approx(2.8 / 6) and found.normalised == pytest.approx(5.6 / 6)
    assert found.n == 2 and found.per_sample == pytest.approx([0.5, 0.4])

    halves = [VisualAttention(layers=2, tokens=3) for _ in range(2)]
    for row, half in enumerate(halves):
        part = slice(row, row + 1)
        half.update(mass[part, :, :2], mass[part, :, :2] * 2, counted[part, :, :2])
    halves[0].merge_state(halves[1])
    assert halves[0].compute().table == found.table
    empty = VisualAttention(layers=1, tokens=2).compute()
    assert empty.value is None and empty.n == 0 and empty.slope is None
    assert empty.table == [[None, None]] and empty.per_sample == []
    for settings in ({"layers": 0, "tokens": 1}, {"layers": 1, "tokens": 0}):
        with pytest.raises(ConfigurationError, match="is 0; it must be at least 1"):
            VisualAttention(**settings)


def shares() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(3, 2, 2, 3, generator=generator))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    metric, idle = VisualAttention(2, 3), VisualAttention(2, 3)
    for mass in shares()[rank::2]:
        metric.update(mass, mass, mass > 0.3)
    if rank:
        idle.update(shares()[0], shares()[0], shares()[0] > 0.3)  # the other one has no answers
    found = {"busy": metric.compute()._asdict(), "idle": idle.compute()._asdict()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    metric, idle = VisualAttention(2, 3), VisualAttention(2, 3)
    for mass in shares():
        metric.update(mass, mass, mass > 0.3)
    idle.update(shares()[0], shares()[0], shares()[0] > 0.3)
    for found, one in ((first["busy"], metric.compute()), (first["idle"], idle.compute())):
        assert found["n"] == one.n
        assert sorted(found["per_sample"]) == pytest.approx(sorted(one.per_sample))
        for name in ("value", "normalised", "slope", "by_layer", "by_token"):
            assert found[name] == pytest.approx(getattr(one, name)), name
        np.testing.assert_allclose(found["table"], one.table)


# ---- on networks --------------------------------------------------------------------------------


def by_loops(model: MultimodalLM, inputs: dict[str, Any], ends: set[int], tokens: int) -> Any:
    """Mass (layers, tokens) from eager attention, element by element."""
    language = model.family.language_model(model.network)
    language.set_attn_implementation("eager")
    output = model.network.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=[*ends],
        output_attentions=True,
        return_dict_in_generate=True,
    )
    language.set_attn_implementation("sdpa")
    visual = model.family.visual_mask(model.network, inputs["input_ids"]).numpy()
    mask, length = inputs["attention_mask"].numpy(), inputs["input_ids"].shape[1]
    answers = output.sequences[:, length:].tolist()
    total, count = np.zeros((2, 3, tokens)), np.zeros((3, tokens))
    for step, layers in enumerate(output.attentions):
        for layer, weights in enumerate(layers):
            for row in range(len(visual)):
                if not visual[row].any() or ends & {*answers[row][:step]}:
                    continue
                heads = weights[row, :, -1, :length].numpy()
                mass = np.mean([sum(head[visual[row]]) for head in heads])
                share = visual[row].sum() / (mask[row].sum() + step)
                total[:, layer, step] += mass, mass / share
                count[layer, step] += 1
    return total / count.clip(min=1), count


@torch.no_grad()
def test_watch_equals_a_loop_over_eager_attention(model: MultimodalLM) -> None:
    inputs, tokens = inputs_of(model), 4
    network: Any = model.network
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    whole = network.generate(**inputs, **options, eos_token_id=None)
    ends = {int(whole[0, inputs["input_ids"].shape[1] + 1])}  # the first row ends at once
    answers = network.generate(**inputs, **options, eos_token_id=[*ends])
    metric = VisualAttention(layers=3, tokens=tokens)
    with metric.watch(network, end_ids=ends):
        for _ in range(2):  # two calls, as batches of `MultimodalLM.answer` are
            again = network.generate(**inputs, **options, eos_token_id=[*ends])
            assert torch.equal(again, answers)
    found = metric.compute()
    (mass, normalised), count = by_loops(model, inputs, ends, tokens)
    assert count[:, 0].tolist() == [2, 2, 2] and count[0, -1] < 2
    for values, wanted in ((found.table, mass), (found.normalised_table, normalised)):
        seen = [[value or 0.0 for value in row] for row in values]
        np.testing.assert_allclose(np.array(seen)[count > 0], wanted[count > 0], atol=1e-5)
    assert found.n == 4 and found.value is not None and 0 < found.value < 1
    sink = VisualAttention(layers=3, tokens=tokens, without_sink=True)
    with sink.watch(network, end_ids=ends):
        network.generate(**inputs, **options, eos_token_id=[*ends])
    other = sink.compute().by_layer
    assert all(a > b for a, b in zip(other, found.by_layer, strict=True))  # type: ignore[operator]


@torch.no_grad()
def test_eviction_lowers_the_mass_in_either_order(llava: MultimodalLM) -> None:
    inputs = inputs_of(llava)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    found = []
    for mode, outer in (("drop", "metric"), ("drop", "eviction"), ("mask", "metric")):
        metric = VisualAttention(layers=3, tokens=4)
        eviction = KVEviction(llava.network, A2SF(0.3), 10, when="every_step", mode=mode)  # type: ignore[arg-type]
        watch = metric.watch(llava.network)
        first, second = (watch, eviction) if outer == "metric" else (eviction, watch)
        with first, second:
            llava.network.generate(**inputs, **options)
        found.append(torch.tensor([metric.compute().table, metric.compute().normalised_table]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-5)
    gone, whole = VisualAttention(layers=3, tokens=4), VisualAttention(layers=3, tokens=4)
    with gone.watch(llava.network), KVEviction(llava.network, A2SF(), 0, visual_only=True):
        llava.network.generate(**inputs, **options)
    with whole.watch(llava.network):
        llava.network.generate(**inputs, **options)
    table, before = gone.compute().table, whole.compute().table
    assert [row[1:] for row in table] == [[None] * 3] * 3  # no visual token is left to see
    assert [row[0] for row in table] == [row[0] for row in before]


@torch.no_grad()
def test_text_only_and_wrong_use(llava: MultimodalLM) -> None:
    network = llava.network
    batch = {"images": [[], []], "question": ["which name ?", "where is anna ?"]}
    inputs = llava.family.model_inputs(llava.inputs(batch, padding="left", answers=False))
    metric = VisualAttention(layers=3, tokens=2)
    with metric.watch(network):
        network.generate(**inputs, max_new_tokens=2)
    found = metric.compute()
    assert found.value is None and found.n == 0 and found.table == [[None, None]] * 3
    assert visual_evidence(network, inputs) == [[], []]
    with pytest.raises(ConfigurationError, match="decoder has 3"):
        VisualAttention(layers=4, tokens=2).watch(network).__enter__()
    with metric.watch(network), pytest.raises(ConfigurationError, match="and a cache"):
        network.generate(**inputs, max_new_tokens=2, use_cache=False)
    with metric.watch(network), pytest.raises(ConfigurationError, match="tokens came to a cache"):
        cache = network(**inputs, use_cache=True).past_key_values
        network(input_ids=inputs["input_ids"], past_key_values=cache)
    with pytest.raises(ConfigurationError, match="`max_new_tokens` is 0"):
        visual_evidence(network, inputs, max_new_tokens=0)


@torch.no_grad()
def test_answers_of_a_model_are_watched(llava: MultimodalLM) -> None:
    pictures = [[one] for one in tiny_pictures(3)]
    questions = ["what digit is this ?", "which name ?", "look again , which colour ?"]
    before = llava.answer(pictures, questions, max_new_tokens=3)
    metric = VisualAttention(layers=3, tokens=3)
    with metric.watch(llava.network, end_ids=llava.end_ids):
        assert llava.answer(pictures, questions, max_new_tokens=3, batch_size=2) == before
    assert metric.compute().n == 3


@torch.no_grad()
def test_maps_of_evidence(model: MultimodalLM) -> None:
    inputs, tokens = inputs_of(model), 3
    maps = visual_evidence(model.network, inputs, tokens, end_ids=[-1])
    assert [[tuple(one.shape) for one in row] for row in maps] == [[(4, 4)], [], [(4, 4)] * 2]
    metric = VisualAttention(layers=3, tokens=tokens)
    with metric.watch(model.network, end_ids=[]):
        model.network.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    sums = [float(sum(one.sum() for one in row)) for row in maps if row]
    assert sums == pytest.approx(metric.compute().per_sample, abs=1e-5)
    assert all((one > 0).all() for row in maps for one in row)

    def one_map(picture: torch.Tensor) -> torch.Tensor:
        batch = {"images": [[picture]], "question": ["what digit is this ?"]}
        given = model.family.model_inputs(model.inputs(batch, padding="left", answers=False))
        return visual_evidence(model.network, given, 1)[0][0]

    first = one_map(tiny_pictures(1)[0])
    given = visual_evidence(model.network, inputs, 1, end_ids=[-1])[0][0]
    torch.testing.assert_close(given, first, rtol=0, atol=1e-5)
