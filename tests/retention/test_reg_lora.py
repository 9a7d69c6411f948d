"""RegLoRA: entries that earlier tasks have changed most are held while the next task is learnt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from mmforget import DigitWorld, ImageClassifier
from mmforget.data.digit_world import strokes
from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    MissingFileError,
    ModelError,
    WeightsError,
)
from mmforget.models.base import state_hash
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.protected_entries import (
    Difference,
    LowRank,
    ProtectedEntries,
    largest_entries,
    lora_changes,
)
from mmforget.retention.reg_lora import RegLoRA, RegLoRACallback
from mmforget.testing.tiny_multimodal import tiny_multimodal, tiny_pictures


def factors(seed: int = 0, height: int = 12, width: int = 7, rank: int = 3) -> LowRank:
    chance = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(height, rank, generator=chance), torch.randn(rank, width, generator=chance)
    )


# ---- entries ------------------------------------------------------------------------------------


def test_entries_equal_those_of_the_dense_product():
    change = factors()
    dense = change.b @ change.a
    index = torch.randperm(84, generator=torch.Generator().manual_seed(1))[:30]
    torch.testing.assert_close(change.entries(index), dense.flatten()[index])
    other = Difference(dense + 1, torch.ones(12, 7))
    torch.testing.assert_close(other.entries(index), dense.flatten()[index])


@pytest.mark.parametrize("chunk", [1, 10, 10**6])
def test_the_largest_entries_do_not_depend_on_the_chunk(chunk):
    change = factors()
    dense = (change.b @ change.a).abs().flatten()
    for share, count in ((0.1, 8), (1.0, 84), (1e-9, 1)):
        found = largest_entries(change, share, chunk)
        assert found.tolist() == dense.topk(count).indices.sort().values.tolist()


def test_entries_that_have_not_moved_are_not_protected():
    change = factors()
    still = LowRank(torch.zeros_like(change.b), change.a)
    assert len(largest_entries(still, 0.5)) == 0
    held = ProtectedEntries()
    held.add({"one": still}, 0.5)
    assert len(held) == 0
    assert float(held.penalty({"one": change})) == 0.0


@pytest.mark.parametrize("chunk", [1, 3, 10**6])
def test_penalty_and_its_gradient_equal_the_dense_ones(chunk):
    one, two = factors(0), factors(1, 5, 9)
    held = ProtectedEntries()
    held.add({"one": one}, 0.1)
    held.add({"two": two}, 0.2)
    held.add({"free": factors(5)}, 0.1)  # not changed by this task
    now = {"one": factors(2), "two": factors(3, 5, 9), "new": factors(4)}
    for change in now.values():
        for part in change:
            part.requires_grad_(True)
    expected = torch.stack(
        [
            (now[name].b @ now[name].a).flatten()[held.places[name]].abs().mean()
            for name in ("one", "two")
        ]
    ).mean()
    found = held.penalty(now, chunk)
    torch.testing.assert_close(found, expected)
    wanted = [*now["one"], *now["two"]]
    for own, other in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_the_entries_of_several_tasks_are_a_set():
    held = ProtectedEntries()
    held.add({"one": factors(0)}, 0.1)
    first = held.places["one"]
    held.add({"one": factors(0)}, 0.1)
    assert held.places["one"].tolist() == first.tolist()
    held.add({"one": factors(7)}, 0.1)
    both = set(first.tolist()) | set(largest_entries(factors(7), 0.1).tolist())
    assert held.places["one"].tolist() == sorted(both)


def test_entries_survive_a_file(tmp_path: Path):
    held = ProtectedEntries()
    held.add({"a.one": factors(0), "b": factors(1, 5, 9)}, 0.1)
    held.save(tmp_path / "new" / "held.safetensors")
    found = ProtectedEntries.load(tmp_path / "new" / "held.safetensors")
    assert found.shapes == held.shapes == {"a.one": (12, 7), "b": (5, 9)}
    assert {name: places.tolist() for name, places in found.places.items()} == {
        name: places.tolist() for name, places in held.places.items()
    }
    with pytest.raises(MissingFileError, match="none for a first task"):
        ProtectedEntries.load(tmp_path / "held.safetensors")
    (tmp_path / "broken").write_text("not a file of tensors")
    with pytest.raises(WeightsError, match="holds no protected entries"):
        ProtectedEntries.load(tmp_path / "broken")
    ProtectedEntries({"b": torch.tensor([45])}, {"b": (5, 9)}).save(tmp_path / "outside")
    with pytest.raises(WeightsError, match=r"outside of a matrix of \(5, 9\)"):
        ProtectedEntries.load(tmp_path / "outside")


# ---- in a loop of one's own ---------------------------------------------------------------------


def perceptron(seed: int = 0, inputs: int = 128) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
        )


LAYERS = ("0", "2", "4")


def learn(keep: RegLoRA, task: tuple[Tensor, Tensor], steps: int, seed: int = 0) -> None:
    trained = [p for p in keep.network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, steps)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(task[0]), (64,), generator=chance)
        loss = nn.functional.cross_entropy(keep.network(task[0][rows]), task[1][rows])
        optimizer.zero_grad()
        (loss + keep.regularisation()).backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def two_tasks() -> dict[str, tuple[Tensor, Tensor]]:
    """Digits 0 to 4 in the left half of a field, and 5 to 9 in the right; five outputs for both."""
    images, labels = strokes()
    pixels, labels = torch.as_tensor(images).float().flatten(1), torch.as_tensor(labels)
    pixels = pixels / pixels.max()
    empty = torch.zeros_like(pixels)
    tasks = {}
    for name, low, field in (
        ("first", 0, torch.cat([pixels, empty], 1)),
        ("second", 5, torch.cat([empty, pixels], 1)),
    ):
        rows = ((labels >= low) & (labels < low + 5)).nonzero().flatten()
        cut = len(rows) * 3 // 4
        tasks[name] = (field[rows[:cut]], labels[rows[:cut]] - low)
        tasks[f"{name}/test"] = (field[rows[cut:]], labels[rows[cut:]] - low)
    return tasks


def accuracy(network: nn.Module, task: tuple[Tensor, Tensor]) -> float:
    return (network(task[0]).argmax(1) == task[1]).double().mean().item()


def test_less_is_forgotten_of_the_first_of_two_tasks(two_tasks):
    settings: dict[str, Any] = {"rank": 8, "lora_alpha": 16, "share": 0.3, "weight": 100}
    lost, learnt = {}, {}
    start = perceptron()
    keep = RegLoRA(start, LAYERS, **settings)
    keep.start_task()
    learn(keep, two_tasks["first"], 60)
    keep.finish_task()
    before = accuracy(start, two_tasks["first/test"])
    assert before > 0.8
    for name, protected in (("free", None), ("held", keep.protected)):
        network = copy.deepcopy(start)
        second = RegLoRA(network, LAYERS, seed=10, protected=protected, **settings)
        second.start_task()
        learn(second, two_tasks["second"], 80, seed=1)
        second.finish_task()
        lost[name] = before - accuracy(network, two_tasks["first/test"])
        learnt[name] = accuracy(network, two_tasks["second/test"])
    assert lost["free"] > 0.1  # there is something to be held
    assert lost["held"] < 0.4 * lost["free"]
    assert learnt["held"] > 0.8 and learnt["held"] > learnt["free"] - 0.1


@pytest.mark.parametrize("rank", [4, None])
def test_a_large_weight_freezes_protected_entries_and_no_others(rank):
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=chance)
    targets = inputs @ torch.randn(8, 8, generator=chance)
    sizes = {}
    for weight in (0.0, 1e3):
        network = nn.Sequential(nn.Linear(8, 8, bias=False))
        with torch.no_grad():
            network[0].weight.zero_()
        held = ProtectedEntries({"0": torch.tensor([0, 1, 13, 40])}, {"0": (8, 8)})
        keep = RegLoRA(network, ["0"], rank=rank, lora_alpha=4, weight=weight, protected=held)
        keep.start_task()
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        for _ in range(100):
            optimizer.zero_grad()
            ((network(inputs) - targets).square().mean() + keep.regularisation()).backward()
            optimizer.step()
            schedule.step()
        dense = keep.changes()["0"].rows(0, 8).detach().abs().flatten()
        mask = torch.zeros(64, dtype=torch.bool)
        mask[held.places["0"]] = True
        sizes[weight] = (float(dense[mask].mean()), float(dense[~mask].mean()))
        keep.merge()
        torch.testing.assert_close(network[0].weight.detach().abs().flatten(), dense)
    assert sizes[1e3][0] < 1e-3 * sizes[0.0][0]
    assert sizes[1e3][1] > 0.4 * sizes[0.0][1]


def test_a_task_begins_and_ends_with_the_network_as_it_is():
    network = perceptron()
    network[0].weight.requires_grad_(False)
    required = [p.requires_grad for p in network.parameters()]
    names, start = list(network.state_dict()), state_hash(network)
    inputs = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    before = network(inputs)
    keep = RegLoRA(network, LAYERS, rank=2, also=["4.bias"])
    keep.start_task()
    torch.testing.assert_close(network(inputs), before)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith("4.base_layer.bias") for name in trained) or (
        trained - {n for n in trained if "lora_" in n} == {"4.bias"}
    )
    with pytest.raises(ConfigurationError, match="a task is running"):
        keep.start_task()
    keep.abandon()
    assert state_hash(network) == start
    keep.start_task()
    keep.finish_task()  # nothing was trained
    assert list(network.state_dict()) == names and state_hash(network) == start
    assert [p.requires_grad for p in network.parameters()] == required
    assert len(keep.protected) == 0
    with pytest.raises(ConfigurationError, match="no task is running"):
        keep.regularisation()


def test_gradients_that_are_added_equal_those_of_the_term():
    network = perceptron()
    keep = RegLoRA(network, LAYERS, rank=3, chunk=5, share=0.1)
    keep.start_task()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    keep.protected.add(keep.changes(), 0.1)
    trained = [p for p in network.parameters() if p.requires_grad]
    term = keep.regularisation()
    expected = torch.autograd.grad(term, trained, allow_unused=True)
    for p in trained[::2]:
        p.grad = torch.ones_like(p)
    assert keep.add_gradients() == pytest.approx(float(term.detach()), rel=1e-5)
    for row, (p, other) in enumerate(zip(trained, expected, strict=True)):
        torch.testing.assert_close(p.grad, other if row % 2 else other + 1)


def test_changes_of_any_lora_of_peft():
    from peft import LoraConfig, get_peft_model

    network = nn.ModuleDict({"core": perceptron()})
    network.forward = lambda inputs: network["core"](inputs)  # type: ignore[method-assign]
    wrapped = get_peft_model(network, LoraConfig(r=2, target_modules=["core.0", "core.2"]))
    found = lora_changes(wrapped)
    assert list(found) == ["core.0", "core.2"]
    assert found["core.0"].shape == (32, 128)
    with pytest.raises(ModelError, match="no LoRA named 'other'"):
        lora_changes(wrapped, "other")
    with pytest.raises(ModelError, match="attach one with peft"):
        lora_changes(perceptron())


def test_settings_without_meaning():
    network = perceptron()
    given: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "`rank` is 0"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0"),
        ({"share": 0}, "`share` is 0"),
        ({"share": 1.1}, r"`share` is 1\.1"),
        ({"weight": -1}, "`weight` is -1"),
    ]
    for settings, message in given:
        with pytest.raises(ConfigurationError, match=message):
            RegLoRA(network, LAYERS, **settings)
        with pytest.raises(ConfigurationError, match=message):
            RegLoRACallback(**settings)
    with pytest.raises(ConfigurationError, match="`layers`"):
        RegLoRA(network, [])
    with pytest.raises(ModelError, match="no layer '7'"):
        RegLoRA(network, ["7"])
    with pytest.raises(ModelError, match="'1' is a ReLU"):
        RegLoRA(network, ["1"])
    with pytest.raises(ModelError, match="`also` names '9'"):
        RegLoRA(network, LAYERS, also=["9"])
    foreign = ProtectedEntries({"0": torch.tensor([1])}, {"0": (5, 9)})
    with pytest.raises(WeightsError, match="made for another network"):
        RegLoRA(network, LAYERS, protected=foreign)
    with pytest.raises(ConfigurationError, match="`kinds` names 'ffns', did you mean 'ffn'"):
        RegLoRACallback(kinds=("ffns",))  # type: ignore[arg-type]


def test_the_language_model_of_a_multimodal_one():
    network, processor = tiny_multimodal("llava")
    model = MultimodalLM(network, processor)
    layers = [site.name for kind in ("attention", "ffn") for site in model.sites(kind)]
    assert len(layers) == 3 * 7  # seven matrices in each of three layers, none of the tower
    pictures = [[one] for one in tiny_pictures(2)]
    batch = {
        "images": pictures,
        "question": ["what is this ?"] * 2,
        "answer": ["seven", "two"],
        "weight": torch.ones(2),
    }
    names, loss = list(network.state_dict()), model.loss(batch).detach()
    keep = RegLoRA(network, layers, rank=2, also=["model.multi_modal_projector"])
    keep.start_task()
    torch.testing.assert_close(model.loss(batch).detach(), loss)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert {model.family.part(name) for name in trained} == {"language", "projector"}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    model.loss(batch).mean().backward()
    optimizer.step()
    tuned = model.loss(batch).detach()
    keep.finish_task()
    assert list(network.state_dict()) == names
    torch.testing.assert_close(model.loss(batch).detach(), tuned)
    assert not torch.allclose(tuned, loss)
    assert set(keep.protected.places) == set(layers)
    # 2 % of a matrix, as in the paper
    assert len(keep.protected.places[layers[0]]) == int(
        0.02 * network.get_submodule(layers[0]).weight.numel()
    )


# ---- in a trainer -------------------------------------------------------------------------------


def fit(model: Any, data: Any, folder: Path, callback: RegLoRACallback, **more: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        max_epochs=1,
        limit_val_batches=0,
        **more,
    )
    trainer.fit(model, datamodule=data)
    return trainer


def test_two_tasks_of_a_trainer(tiny_model: ImageClassifier, tiny_data: DigitWorld, tmp_path: Path):
    tiny_data.view = "full"
    names = list(tiny_model.network.state_dict())
    start = {k: v.clone() for k, v in tiny_model.network.state_dict().items()}
    first = RegLoRACallback(rank=2, lora_alpha=4, share=0.1, save=tmp_path / "one.safetensors")
    fit(tiny_model, tiny_data, tmp_path, first)
    after = tiny_model.network.state_dict()
    assert list(after) == names
    layers = {site.name for kind in ("attention", "ffn") for site in tiny_model.sites(kind)}
    moved = {k for k, v in after.items() if not torch.equal(v, start[k])}
    assert moved == {f"{name}.weight" for name in layers}
    assert all(p.requires_grad for p in tiny_model.parameters())
    held = ProtectedEntries.load(tmp_path / "one.safetensors")
    assert set(held.places) == layers

    changes = {}
    for weight in (0.0, 1e5):
        model = copy.deepcopy(tiny_model)
        again = RegLoRACallback(
            rank=2,
            lora_alpha=4,
            share=0.1,
            weight=weight,
            protected=tmp_path / "one.safetensors",
        )
        trainer = fit(model, tiny_data, tmp_path, again, accumulate_grad_batches=2)
        assert float(trainer.callback_metrics["train/reg_lora"]) >= 0
        held_change, other = [], []
        for name, places in held.places.items():
            key = f"{name}.weight"
            change = (model.network.state_dict()[key] - after[key]).abs().flatten()
            mask = torch.zeros(len(change), dtype=torch.bool)
            mask[places] = True
            held_change.append(change[mask].mean())
            other.append(change[~mask].mean())
        changes[weight] = (torch.stack(held_change).mean(), torch.stack(other).mean())
        written = ProtectedEntries.load(tmp_path / "protected_entries.safetensors")
        assert all(
            set(p.tolist()) <= set(written.places[n].tolist()) for n, p in held.places.items()
        )
    assert changes[1e5][0] / changes[1e5][1] < 0.7 * changes[0.0][0] / changes[0.0][1]


def test_a_trainer_that_fails_gives_the_model_back(tiny_model, tiny_data, tmp_path):
    tiny_data.view = "full"
    start, names = state_hash(tiny_model), list(tiny_model.state_dict())

    class Failing(RegLoRACallback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fit(tiny_model, tiny_data, tmp_path, Failing(rank=2))
    assert list(tiny_model.state_dict()) == names
    assert state_hash(tiny_model) == start


def test_a_model_without_sites_is_refused(tiny_data, tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(CapabilityError, match="RegLoRA needs Sites"):
        fit(BoringModel(), None, tmp_path, RegLoRACallback(rank=2))


@pytest.mark.slow
def test_two_tasks_of_the_command_line(tmp_path: Path):
    from mmforget.cli.main import main

    callback = {"class_path": "mmforget.retention.RegLoRACallback"}
    settings: dict[str, Any] = {
        "model": {
            "class_path": "ImageClassifier",
            "init_args": {"network": "vit_tiny_patch16_224", "num_classes": 10}
            | {"network_args": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2,
                                "num_heads": 3}},
        },
        "data": {"class_path": "DigitWorld", "init_args": {"strokes": 60, "variants": 2}},
    }  # fmt: skip
    held: str | None = None
    for task in ("one", "two"):
        arguments = {"rank": 2, "lora_alpha": 4} | ({"protected": held} if held else {})
        settings["trainer"] = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "callbacks": [callback | {"init_args": arguments}],
        }
        file = tmp_path / f"{task}.yaml"
        file.write_text(yaml.safe_dump(settings))
        assert main(["fit", "-c", str(file), "--run", str(tmp_path / task)]) == 0
        held = str(tmp_path / task / "protected_entries.safetensors")
        assert len(ProtectedEntries.load(held)) > 0
    first = ProtectedEntries.load(tmp_path / "one" / "protected_entries.safetensors")
    both = ProtectedEntries.load(held)
    assert len(first) < len(both) <= 2 * len(first)
    weights = (tmp_path / "two" / "weights").iterdir()
    assert any(path.suffix == ".safetensors" for path in weights)


def test_two_processes_give_the_result_of_one(tiny_model, tiny_data, tmp_path):
    tiny_data.view = "full"
    held = {
        site.name: torch.arange(0, site.module.weight.numel(), 9)
        for kind in ("attention", "ffn")
        for site in tiny_model.sites(kind)
    }
    shapes = {n: tuple(tiny_model.network.get_submodule(n).weight.shape) for n in held}
    ProtectedEntries(held, shapes).save(tmp_path / "held.safetensors")
    found = {}
    for name, more in (
        ("one", {}),
        ("two", {"strategy": "ddp_fork_find_unused_parameters_true", "devices": 2}),
    ):
        model = copy.deepcopy(tiny_model)
        callback = RegLoRACallback(
            rank=2,
            lora_alpha=4,
            weight=10.0,
            protected=tmp_path / "held.safetensors",
            save=tmp_path / name / "next.safetensors",
        )
        fit(model, tiny_data, tmp_path, callback, **more)
        found[name] = model.network.state_dict()
    assert list(found["one"]) == list(found["two"])
    for name, value in found["one"].items():
        torch.testing.assert_close(found["two"][name], value, rtol=0, atol=2e-5)
    start = tiny_model.network.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in found["two"].items())
    one, two = (ProtectedEntries.load(tmp_path / n / "next.safetensors") for n in ("one", "two"))
    assert len(one) == pytest.approx(len(two), rel=0.01)
