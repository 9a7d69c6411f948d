"""The static table says what the classes say."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmforget.models.base as capabilities
from mmforget.cli.catalogue import CATALOGUE, DATA, METHODS, MODELS, Entry, fits
from mmforget.cli.main import main
from mmforget.data.base import ForgetDataModule
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Model
from mmforget.models.clip import load_clip
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.gan import ImageGAN
from mmforget.models.multimodal import MultimodalLM

REPOSITORY = Path(__file__).parents[2]
BASES = (
    ".base",
    ".text_guided",
    ".memorization",
    ".pruning",
    ".memory_fine_tuning",
    ".generator_editing",
    ".data.detection",
    ".data.questions",
    ".answer_unlearning",
)
EVERYTHING = [entry for entries in CATALOGUE.values() for entry in entries]


def resolve(entry: Entry) -> Any:
    module, _, name = entry.target.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("entry", EVERYTHING, ids=lambda entry: entry.name)
def test_entry_exists_and_is_described(entry: Entry) -> None:
    assert inspect.getdoc(resolve(entry))
    assert 10 <= len(entry.summary) <= 90


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_methods_declare_what_the_table_says(entry: Entry) -> None:
    method = resolve(entry)
    assert issubclass(method, ForgettingMethod)
    assert set(entry.capabilities) == {need.__name__ for need in method.requires}
    assert entry.reads == method.access.retain


def model_of(entry: Entry, classifier: Model) -> Model:
    if entry.name == "DiffusionGenerator":
        from mmforget.testing.tiny_pipelines import tiny_pipeline

        return DiffusionGenerator(tiny_pipeline("sd"))
    if entry.name == "ImageGAN":
        return ImageGAN("dcgan")
    if entry.name == "Detector":
        from mmforget.testing.tiny_detectors import tiny_detector

        return tiny_detector("rt_detr")
    if entry.name == "MultimodalLM":
        from mmforget.testing.tiny_multimodal import tiny_multimodal

        return MultimodalLM(*tiny_multimodal("llava"))
    return load_clip() if entry.name == "ClipModel" else classifier


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_models_offer_what_the_table_says(entry: Entry, tiny_model: Model) -> None:
    model = model_of(entry, tiny_model)
    assert isinstance(model, resolve(entry))
    for name in ("HasLoss", "HasLogits", "HasFeatures", "HasHead", "Answers", "Sites",
                 "TextConditioned", "Generates", "HasLatents"):  # fmt: skip
        offered = isinstance(model, getattr(capabilities, name))
        assert offered == (name in entry.capabilities), name


def test_nothing_public_is_missing() -> None:
    import mmforget.data
    import mmforget.methods

    for package, base, entries in (
        (mmforget.methods, ForgettingMethod, METHODS),
        (mmforget.data, ForgetDataModule, DATA),
    ):
        public = [getattr(package, name) for name in package.__all__]
        classes = {
            c.__name__
            for c in public
            if inspect.isclass(c) and issubclass(c, base) and not c.__module__.endswith(BASES)
        }
        assert classes == {entry.name for entry in entries}


def test_fits() -> None:
    classifier, detector, multimodal, generator, gan, clip = MODELS
    pictures = {m.name for m in METHODS if "TextConditioned" in m.capabilities}
    latents = {m.name for m in METHODS if "HasLatents" in m.capabilities}
    assert {m.name for m in METHODS if fits(m, generator)} == pictures | {"Identity"}
    assert {m.name for m in METHODS if fits(m, gan)} == latents | {"Identity"}
    assert {m.name for m in METHODS if fits(m, clip)} == {"Identity"}
    words = {m.name for m in METHODS if "Answers" in m.capabilities}
    labelled = {m.name for m in METHODS} - pictures - latents - words
    assert {m.name for m in METHODS if fits(m, detector)} == labelled - {"SCRUB"}
    assert {m.name for m in METHODS if fits(m, classifier)} == labelled
    scored = {m.name for m in METHODS if "HasLogits" in m.capabilities}
    assert {m.name for m in METHODS if fits(m, multimodal)} == (labelled - scored) | words
    assert not fits(METHODS[0], Entry("a:B", "", capabilities=("HasLoss",)))


def test_the_short_names_of_erase_are_the_methods_for_concepts() -> None:
    from mmforget.erase import METHODS as SHORT

    targets = {m.target for m in METHODS if m.summary.startswith("concepts:")}
    assert set(SHORT.values()) == targets


def test_the_short_names_of_gans_are_the_methods_for_them() -> None:
    from mmforget.erase_gan import METHODS as SHORT

    assert set(SHORT.values()) == {m.target for m in METHODS if m.summary.startswith("GANs:")}


def test_the_short_names_of_memorization_are_the_methods_for_memories() -> None:
    from mmforget.cli.memorization.find import DETECTORS
    from mmforget.cli.memorization.prune import CONTROLS, LOCATORS
    from mmforget.cli.memorization.repair import REPAIRS

    memories = {m.target for m in METHODS if m.summary.startswith("memories:")}
    assert {*LOCATORS.values(), *REPAIRS.values()} == memories
    masks = {m.target for m in METHODS if m.summary.startswith("control: as many weights")}
    assert set(CONTROLS.values()) == masks
    assert set(DETECTORS.values()) <= {entry.target for entry in CATALOGUE["detectors"]}


@pytest.mark.parametrize("kind", [*CATALOGUE, "configs"])
def test_list(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    text = capsys.readouterr().out
    for entry in CATALOGUE.get(kind, ()):
        assert entry.name in text
    assert text.count("\n") >= 1


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda p: p.stem
)
def test_configs_say_how_to_run_them(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert str(path.relative_to(REPOSITORY)) in lines[1]
    assert yaml.safe_load(text)["model"]
