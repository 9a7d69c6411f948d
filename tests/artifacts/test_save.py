"""Artifacts: manifest, folder, model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmforget.artifacts.manifest import Manifest, config_hash, library_versions, manifest_hash
from mmforget.artifacts.model_card import model_card
from mmforget.artifacts.save import folder_name, save_artifact
from mmforget.audit.results import MetricResult, ModelEntry, Results, Verdict
from mmforget.errors import DataError, MissingFileError, RunExistsError, StorageError
from mmforget.models.base import Model, state_hash
from mmforget.request import ForgetRequest


class Small(Model):
    """A network with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)
        nn.init.zeros_(self.network.weight)

    def save_native(self, folder: Path) -> None:
        """One safetensors file, and a README as some libraries write it."""
        tensors: dict[str, Tensor] = self.network.state_dict()
        save_file(tensors, folder / "model.safetensors")
        (folder / "README.md").write_text("a README full of blanks")

    def fresh(self, seed: int) -> Small:
        """Saving never rebuilds a model; a call is a defect and must fail the test."""
        raise NotImplementedError


class Large(Small):
    """Its second file needs 400 kB."""

    def save_native(self, folder: Path) -> None:
        """The small file first, then a large one."""
        super().save_native(folder)
        save_file({"a": torch.zeros(100_000)}, folder / "large.safetensors")


def manifest(**changes: object) -> Manifest:
    """A manifest as a run makes it."""
    settings = {
        "base_model": "assets/digits-vit", "base_hash": "ab" * 32, "method": "GSLoRAPlusPlus",
        "settings": {"rank": 8, "init_args": {"lr": 0.01}},
        "config_hash": config_hash({"a": 1}), "request_hashes": ("cd" * 32,),
        "data_hash": "ef" * 32, "split_hash": "01" * 32, "seeds": {"method": 3},
    }  # fmt: skip
    return Manifest(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved artifact with one adapter."""
    folder = tmp_path / "artifact"
    adapters = {"first": lambda target: (target / "adapter.json").write_text("{}")}
    save_artifact(Small(), folder, manifest(), "# Card\n", adapters)  # type: ignore[arg-type]
    return folder


def test_saved_artifact_is_complete(saved: Path) -> None:
    found = Manifest.read(saved)
    assert set(found.files) == {"model.safetensors", "README.md", "adapters/first/adapter.json"}
    assert (saved / "README.md").read_text() == "# Card\n"
    assert found.verify(saved) == []
    assert load_file(saved / "model.safetensors")["weight"].shape == (2, 2)
    assert [entry.name for entry in saved.parent.iterdir()] == ["artifact"]
    assert found.request_hashes == ("cd" * 32,)
    assert found.libraries == library_versions()
    assert found.created.endswith("+00:00")


def test_result_hash_is_that_of_the_saved_model(tmp_path: Path) -> None:
    model = Small()
    assert save_artifact(model, tmp_path / "a", manifest(), "").result_hash == state_hash(model)


def test_changed_missing_and_unexpected_files_are_found(saved: Path) -> None:
    found = Manifest.read(saved)
    (saved / "README.md").write_text("changed")
    (saved / "adapters/first/adapter.json").unlink()
    (saved / "new.bin").write_bytes(b"x")
    assert found.verify(saved) == [
        "'README.md' has changed",
        "'adapters/first/adapter.json' is missing",
        "'new.bin' is not in the manifest",
    ]


def test_one_flipped_bit_in_the_weights_is_found(saved: Path) -> None:
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(bytes(data))
    assert Manifest.read(saved).verify(saved) == ["'model.safetensors' has changed"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "format version None"),
        ('{"format_version": 99}', "format version 99, this mmforget reads 1"),
        ('{"format_version": 1, "bogus": 2}', "missing or unknown fields: .*bogus"),
    ],
)
def test_bad_manifest(saved: Path, content: str, message: str) -> None:
    (saved / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Manifest.read(saved)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="give an artifact folder"):
        Manifest.read(tmp_path)
    with pytest.raises(MissingFileError, match="give an artifact folder"):
        manifest_hash(tmp_path)


def test_existing_artifact_is_refused_or_replaced(saved: Path) -> None:
    with pytest.raises(RunExistsError, match="overwrite=True"):
        save_artifact(Small(), saved, manifest(), "other")
    assert (saved / "README.md").read_text() == "# Card\n"
    save_artifact(Small(), saved, manifest(), "other", overwrite=True)
    assert (saved / "README.md").read_text() == "other"
    assert not (saved / "adapters").exists()


def test_full_disk_keeps_the_earlier_artifact(
    saved: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    # the Rust code of safetensors reports it with an exception class of its own
    with full_disk(5000), pytest.raises(StorageError, match="no space left"):
        save_artifact(Large(), saved, manifest(), "other", overwrite=True)
    assert Manifest.read(saved).verify(saved) == []
    assert (saved / "README.md").read_text() == "# Card\n"
    assert [entry.name for entry in saved.parent.iterdir()] == ["artifact"]


def test_rest_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".artifact.saving").mkdir()
    (tmp_path / ".artifact.saving" / "half.bin").write_bytes(b"x")
    save_artifact(Small(), tmp_path / "artifact", manifest(), "")
    assert "half.bin" not in Manifest.read(tmp_path / "artifact").files
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_folder_names() -> None:
    assert folder_name("forget-3-8") == "forget-3-8"
    hostile = [
        folder_name(name) for name in ("../../etc", "a/b", "a b", "...", "", "a\\b", "é" * 99)
    ]
    assert all("/" not in name and not name.startswith(".") and name for name in hostile)
    assert len(set(hostile)) == len(hostile)


# ---- model card --------------------------------------------------------------


def evidence() -> Results:
    """Invented results with one metric."""
    return Results(
        title="Forget <script>alert(1)</script>",
        goal="untraining",
        requests=[],
        data={"name": "digits", "class_names": ["zero", "one"]},
        models=[ModelEntry("original", "original"), ModelEntry("unlearned", "unlearned")],
        metrics=[
            MetricResult("accuracy", name, "forgetting", value, "lower", "test_forget", "fraction")
            for name, value in (("original", 0.9), ("unlearned", 0.0))
        ],
        checks=[],
        verdict=Verdict("forgotten", "the accuracy fell to 0 % | n = 9"),
        not_measured=["the rest"],
    )


def test_card_says_what_was_forgotten_and_shows_the_evidence() -> None:
    import yaml

    requests = [ForgetRequest(classes=(1,), reason="Jane Doe asked")]
    card = model_card(manifest(), requests, evidence())
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert "gslorapluspl" in yaml.safe_load(front)["tags"][-1]
    assert "class one" in body
    assert "90.0" in body and "init args: lr" in body and "Not measured: the rest" in body
    assert "<script>" not in card and r"0 % \| n = 9" in body
    assert "Jane" not in card


def test_card_names_samples_by_count_and_hash_only() -> None:
    card = model_card(manifest(), [ForgetRequest(samples=(918273, 645342))])
    assert "2 samples, ids SHA-256" in card
    assert "918273" not in card and "645342" not in card
    assert "Nothing was measured" in card


def test_manifest_is_readable_json(saved: Path) -> None:
    body = json.loads((saved / "manifest.json").read_text())
    assert body["settings"] == {"rank": 8, "init_args": {"lr": 0.01}}
    assert body["seeds"] == {"method": 3}
