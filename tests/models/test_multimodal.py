"""`MultimodalLM`: answers, capabilities, training, native folders."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    DataError,
    MissingFileError,
    ModelError,
    WeightsError,
)
from mmforget.methods.random_labels import RandomLabels
from mmforget.models.base import HasFeatures, HasHead, HasLogits, HasLoss, Sites, state_hash
from mmforget.models.multimodal import MultimodalLM, load_multimodal
from mmforget.models.multimodals.base import Part
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures


def batch() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [], [two, three]],
        "question": ["what is this ?", "where is anna ?", "what are this ?"],
        "answer": ["anna", "rome", "red blue"],
        "label": torch.tensor([0, 1, 2]),
        "id": torch.arange(3),
        "weight": torch.ones(3),
    }


def loader(*batches: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader([*batches], batch_size=None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava")).eval()


@pytest.fixture
def model(shared: MultimodalLM) -> MultimodalLM:
    return copy.deepcopy(shared)


def test_capabilities(model: MultimodalLM) -> None:
    for capability in (HasLoss, HasFeatures, HasHead, Sites):
        assert isinstance(model, capability)
    assert not isinstance(model, HasLogits)  # tokens are no classes
    with pytest.raises(CapabilityError, match="RandomLabels needs HasLogits"):
        RandomLabels(model)
    found = model.instances(batch())
    assert torch.allclose(found.features, model.features(batch()), atol=1e-5)
    assert torch.allclose(found.loss.total, model.loss(batch()))
    assert found.logits.shape == (3, model.vocabulary) and found.features.shape == (3, 32)
    assert model.forget_bound == pytest.approx(torch.tensor(model.vocabulary).log().item())


@pytest.mark.parametrize("kind", get_args(TinyMultimodalKind))
def test_answers_depend_on_the_picture_and_not_on_their_neighbours(kind: Any) -> None:
    model = MultimodalLM(*tiny_multimodal(kind)).eval()
    given = batch()
    together = model.answer(given["images"], given["question"], 5)
    alone = [
        model.answer([shown], [asked], 5)[0]
        for shown, asked in zip(given["images"], given["question"], strict=True)
    ]
    assert together == alone
    assert model.answer(given["images"], given["question"], 5, batch_size=2) == together
    pictures = tiny_pictures(6, seed=1)
    answers = model.answer([[one] for one in pictures], ["what is this ?"] * 6, 6)
    assert len(set(answers)) > 1, "the picture does not reach `generate`"


def test_generation_needs_pictures_for_every_placeholder(model: MultimodalLM) -> None:
    given = batch()
    with pytest.raises(DataError, match="3 questions, but 2 lists of pictures"):
        model.answer(given["images"][:2], given["question"])
    model.processor = copy.copy(model.processor)
    model.processor.chat_template = "{% for m in messages %}what is this ?{% endfor %}"
    with pytest.raises(Exception, match=r"visual tokens|image"):
        model.answer([given["images"][0]], ["what is this ?"])


def test_answering_leaves_the_mode_alone(model: MultimodalLM) -> None:
    model.train()
    model.answer([[]], ["where is anna ?"], 1)
    assert model.network.training


def test_only_named_parts_are_trained(shared: MultimodalLM) -> None:
    for trained in (("vision",), ("projector", "head"), ("language",)):
        model = MultimodalLM(shared.network, shared.processor, trained=trained)  # type: ignore[arg-type]
        parts: set[Part] = {
            model.family.part(name)
            for name, parameter in model.network.named_parameters()
            if parameter.requires_grad
        }
        assert parts == set(trained)
    with pytest.raises(ConfigurationError, match="`trained` is \\['tower'\\]"):
        MultimodalLM(shared.network, shared.processor, trained=("tower",))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no parameters there"):
        MultimodalLM(shared.network, shared.processor, trained=("other",))
    MultimodalLM(shared.network, shared.processor)


def test_a_step_of_training_leaves_frozen_parts_alone(
    model: MultimodalLM, quiet_trainer: Callable[..., Trainer]
) -> None:
    model.lr = 1e-2
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    quiet_trainer(max_epochs=3).fit(model, loader(batch()), loader(batch()))
    changed = {
        model.family.part(name)
        for name, value in model.network.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed == {"projector", "language", "head"}
    assert model.loss(batch()).mean() < 4.0


def test_training_learns_the_answers(
    model: MultimodalLM, quiet_trainer: Callable[..., Trainer]
) -> None:
    model.lr, model.warmup = 1e-2, 0.0
    quiet_trainer(max_epochs=40).fit(model, loader(batch()))
    assert model.answer(batch()["images"], batch()["question"]) == batch()["answer"]
    found = quiet_trainer().test(model, loader(batch()), verbose=False)[0]
    assert found["test/exact"] == 1.0 and found["test/loss"] < 0.5
    rows: Any = quiet_trainer().predict(
        model, loader(batch() | {"weight": torch.tensor([1.0, 0, 1])})
    )
    assert rows[0]["answer"] == ["anna", "red blue"] and rows[0]["id"].tolist() == [0, 2]


@pytest.mark.parametrize("kind", [k for k in get_args(TinyMultimodalKind) if k != "smolvlm"])
@torch.no_grad()
def test_native_folders(kind: Any, tmp_path: Path) -> None:
    model = MultimodalLM(*tiny_multimodal(kind)).eval()
    model.save_native(tmp_path)
    loaded = load_multimodal(tmp_path)
    assert not loaded.training and type(loaded.family) is type(model.family)
    assert state_hash(loaded) == state_hash(model)
    # not equal where transformers reads back another image processor than it has saved
    assert torch.allclose(loaded.loss(batch()), model.loss(batch()), atol=1e-3)
    state = torch.get_rng_state()
    again = loaded.fresh(1)
    assert torch.equal(torch.get_rng_state(), state) and again.training
    assert state_hash(again) == state_hash(model.fresh(1)) != state_hash(model)
    assert torch.isfinite(again.loss(batch())).all()
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_a_program_without_mmforget_reads_the_folder(model: MultimodalLM, tmp_path: Path) -> None:
    picture = tiny_pictures(1)[0]
    model.save_native(tmp_path)
    save_file({"picture": picture}, tmp_path / "picture.safetensors")
    program = f"""
import sys
sys.modules["mmforget"] = None
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = {str(tmp_path)!r}
network = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
content = [{{"type": "image"}}, {{"type": "text", "text": "who is this ?"}}]
turn = {{"role": "user", "content": content}}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
picture = load_file(folder + "/picture.safetensors")["picture"]
inputs = processor(text=[text], images=[picture], return_tensors="pt")
ids = network.generate(**inputs, max_new_tokens=4, do_sample=False)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.strip() == model.answer([[picture]], ["who is this ?"], 4)[0]


def test_broken_folders_are_refused_in_one_line(model: MultimodalLM, tmp_path: Path) -> None:
    model.save_native(tmp_path)
    with pytest.raises(MissingFileError, match="no folder"):
        load_multimodal(tmp_path / "nowhere")
    weights = load_file(tmp_path / "model.safetensors")
    lost = min(weights)
    for changed, message in (
        ({key: value for key, value in weights.items() if key != lost}, "lack 1 tensors"),
        (weights | {"more": torch.ones(1)}, "have unknown 1 tensors"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=message):
            load_multimodal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_multimodal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")  # a pickle is not even looked at
    with pytest.raises(WeightsError):
        load_multimodal(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava_next"}))
    with pytest.raises(ModelError, match="model_type"):
        load_multimodal(tmp_path)


def test_half_precision_on_the_cpu_is_refused(model: MultimodalLM) -> None:
    model.network.half()
    with pytest.raises(ModelError, match="float16 on the CPU"):
        model.loss(batch())
    model.network.bfloat16()
    assert torch.isfinite(model.loss(batch())).all()
    assert len(model.answer([[]], ["where is anna ?"], 2)) == 1


def test_a_network_needs_its_processor() -> None:
    network, _ = tiny_multimodal("llava")
    with pytest.raises(ModelError, match="without `processor`"):
        MultimodalLM(network)
    with pytest.raises(ConfigurationError, match="`max_new_tokens` is 0"):
        MultimodalLM(network, max_new_tokens=0)


def test_adapters_must_be_merged_before_saving(model: MultimodalLM, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], r=2)
    wrapped = MultimodalLM(get_peft_model(model.network, config), model.processor)
    with pytest.raises(ModelError, match="merge them"):
        wrapped.save_native(tmp_path)
    with pytest.raises(ModelError, match="merge them first"):
        wrapped.fresh(0)
