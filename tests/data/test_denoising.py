"""Records of trajectories and noised pictures, and the order in which they are trained on."""

from __future__ import annotations

import pytest
import torch

from mmforget.data.denoising import (
    DenoisingRecords,
    made_pictures,
    noised_records,
    spread,
    trajectory_records,
)
from mmforget.data.record_stream import RecordStream
from mmforget.errors import ConfigurationError
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

PROMPTS = ["a cat", "a photo of a dog"]


def generator_of(kind: str = "sd") -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=3)


def away(conditional, plain, _):
    return plain - 2.0 * (conditional - plain)


def trajectories(model, **settings):
    return trajectory_records(
        model, PROMPTS, away, **({"count": 2, "steps": 3, "guidance": 3.0, "seed": 0} | settings)
    )


def numbered(size: int, prompts=("a",)) -> DenoisingRecords:
    values = torch.arange(size, dtype=torch.float)
    latents = values[:, None, None, None].expand(size, 1, 2, 2)
    return DenoisingRecords(latents, values, latents, torch.zeros(size, dtype=torch.long), prompts)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@torch.no_grad()
def test_targets_are_those_of_freshly_computed_predictions(kind):
    model = generator_of(kind)
    records = trajectories(model)
    assert len(records) == 2 * 2 * 3
    table, empty = model.encode(PROMPTS), model.unconditional()
    rows = torch.zeros(len(records), dtype=torch.long)
    conditional = model.predict(records.noisy, records.time, table[records.prompt])
    plain = model.predict(records.noisy, records.time, empty[rows])
    assert not torch.allclose(conditional, plain, atol=1e-4)
    torch.testing.assert_close(records.target, away(conditional, plain, 0), rtol=1e-3, atol=1e-4)


def test_the_first_step_is_the_noise_and_the_last_is_near_the_picture():
    model = generator_of()
    records = trajectories(model)
    first = records.noisy[records.time == records.time.max()]
    noise = torch.cat([model.noise([prompt], 2, seed=0) for prompt in PROMPTS])
    torch.testing.assert_close(first, noise)


def test_trajectories_do_not_depend_on_the_global_generator_or_the_batch_size():
    model = generator_of()
    torch.manual_seed(1)
    one = trajectories(model)
    torch.manual_seed(2)
    same, small = trajectories(model), trajectories(model, batch_size=1)
    assert torch.equal(one.target, same.target)
    by_trajectory = one.target.view(3, 4, *one.target.shape[1:]).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(small.target, by_trajectory, rtol=1e-3, atol=1e-4)
    assert not torch.equal(one.noisy, trajectories(model, seed=1).noisy)


def test_counts_per_prompt_and_passes():
    records = trajectories(generator_of(), count=[3, 1])
    assert torch.bincount(records.prompt).tolist() == [9, 3]
    assert records.passes == 4 * 3 * 2
    more = trajectory_records(
        generator_of(), PROMPTS, lambda a, b, _, c: c, 1, 3, 3.0, 0, further=["", "a car"]
    )
    assert more.passes == 2 * 3 * 3


@torch.no_grad()
def test_further_prompts_are_predicted_at_every_step():
    model = generator_of()
    records = trajectory_records(
        model, PROMPTS, lambda a, b, _, c: c, 1, 3, 3.0, 0, further=["a car", "a tree"]
    )
    table = model.encode(["a car", "a tree"])
    found = model.predict(records.noisy, records.time, table[records.prompt])
    torch.testing.assert_close(records.target, found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
@torch.no_grad()
def test_noised_pictures(kind):
    model = generator_of(kind)
    made = made_pictures(model, PROMPTS, 2, 3, 3.0, 0)
    assert made.which.tolist() == [0, 0, 1, 1]
    assert made.passes == 4 * 3 * 2
    true = noised_records(model, made, 3, 0)
    taught = noised_records(model, made, 3, 0, teacher=["a house", "a tree"], student=["x", "y"])
    assert torch.equal(true.noisy, taught.noisy)
    assert (true.prompts, taught.prompts) == (tuple(PROMPTS), ("x", "y"))
    assert (true.passes, taught.passes) == (0, 12)
    # The truth: x_t and the target together give the picture back.
    latents = made.latents.repeat_interleave(3, 0)
    time = true.time if model.prediction == "flow" else true.time.long()
    signal, level = model._levels(time, latents)
    if model.prediction == "epsilon":
        noise = true.target
    elif model.prediction == "flow":
        noise = true.target + latents
    else:
        noise = (true.target + level * latents) / signal
    torch.testing.assert_close(signal * latents + level * noise, true.noisy, rtol=1e-3, atol=1e-3)
    assert len(set(true.time.tolist())) > 6
    table = model.encode(["a house", "a tree"])
    found = model.predict(taught.noisy, taught.time, table[taught.prompt])
    torch.testing.assert_close(taught.target, found, rtol=1e-3, atol=1e-4)


def test_spread_reaches_every_word_and_sentence():
    groups = [["a1", "a2", "a3"], ["b1", "b2", "b3"]]
    assert set(spread(groups, 2)) == {(0, 0), (1, 1)}
    assert set(spread(groups, 6)) == {(word, n) for word in range(2) for n in range(3)}
    counts = spread(groups, 14)
    assert sum(counts.values()) == 14
    assert max(counts.values()) - min(counts.values()) <= 1


def test_join_keeps_prompts_and_mixes_the_parts():
    both = DenoisingRecords.join([numbered(4, ("a", "b")), numbered(2, ("c",))])
    assert both.prompts == ("a", "b", "c")
    assert both.prompt.tolist() == [0, 2, 0, 0, 2, 0]


def test_padding_has_no_weight():
    batch = numbered(4)[[2, ~1]]
    assert batch["time"].tolist() == [2.0, 1.0]
    assert batch["weight"].tolist() == [1.0, 0.0]


def test_records_of_different_numbers_are_refused():
    part = numbered(3)
    with pytest.raises(ConfigurationError, match="same number"):
        DenoisingRecords(part.noisy, part.time[:2], part.target, part.prompt, ["a"])
    with pytest.raises(ConfigurationError, match="no picture"):
        trajectories(generator_of(), count=0)


# ---- the stream ---------------------------------------------------------------------------------


def steps_of(stream: RecordStream, epochs: int = 1) -> list[dict[str, list[float]]]:
    return [
        {name: part["time"].tolist() for name, part in batch.items()}
        for _ in range(epochs)
        for batch in stream
    ]


def stream(first: int = 0, seed: int = 0, **sizes: int) -> RecordStream:
    records = {"forget": numbered(7), "retain": numbered(4)}
    return RecordStream(records, {"forget": 3, "retain": 2} | sizes, seed, first)


def test_a_batch_depends_on_its_step_alone():
    whole = steps_of(stream(), epochs=4)
    assert len(whole) == 12
    for first in (1, 3, 5):
        assert steps_of(stream(first), epochs=2) == whole[first : first + 6]
    assert steps_of(stream(seed=1), epochs=4) != whole


def test_every_permutation_is_gone_through():
    whole = steps_of(stream(), epochs=7)
    for name, size in (("forget", 7), ("retain", 4)):
        values = [value for batch in whole for value in batch[name]]
        for start in range(0, len(values) - size, size):
            assert sorted(values[start : start + size]) == list(range(size))


def test_batches_may_be_larger_than_the_records():
    batch = steps_of(stream(retain=9))[0]["retain"]
    assert sorted(batch[:4]) == sorted(batch[4:8]) == [0.0, 1.0, 2.0, 3.0]


def test_processes_share_a_batch_without_overlap(monkeypatch):
    alone = steps_of(stream())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(list(stream()))
    for batch, one, other in zip(alone, *shares, strict=True):
        for name in batch:
            assert len(one[name]["time"]) == len(other[name]["time"])
            kept = [
                value
                for part in (one, other)
                for value, weight in zip(part[name]["time"], part[name]["weight"], strict=True)
                if weight
            ]
            assert sorted(float(value) for value in kept) == sorted(batch[name])
