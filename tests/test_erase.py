"""Erasing concepts with one call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mmforget
from mmforget import ConceptSpec, DiffusionGenerator, ForgetRequest
from mmforget.data.split import Limits, make_split
from mmforget.erase import (
    METHODS,
    as_concepts,
    automatic,
    find_method,
    run_erasure,
    run_method,
)
from mmforget.errors import ConfigurationError, MissingFileError, ModelError, RequestError
from mmforget.models.base import state_hash
from mmforget.testing.tiny_pipelines import tiny_pipeline

CAT = ConceptSpec("cat", preserve=("dog", "a house"), templates=("{}", "a photo of {}"))
FAST: dict[str, dict[str, Any]] = {
    "esd": {"trajectories": 1, "retain_trajectories": 1, "sampling_steps": 2},
    "concept-ablation": {},
    "salun": {},
}


@pytest.fixture
def pipe() -> Any:
    """A tiny Stable Diffusion pipeline."""
    return tiny_pipeline("sd")


def test_returns_a_new_pipeline_and_leaves_the_given_one_as_it_was(pipe: Any) -> None:
    before = state_hash(pipe.unet)
    edited = mmforget.erase(pipe, "cat", preserve=["dog"], progress=False)
    assert type(edited) is type(pipe)
    assert state_hash(pipe.unet) == before
    assert state_hash(edited.unet) != before
    same = mmforget.erase(pipe, "cat", preserve=["dog"], progress=False)
    assert state_hash(same.unet) == state_hash(edited.unet)


def test_edits_in_place_if_no_copy_is_wanted(pipe: Any) -> None:
    before = state_hash(pipe.unet)
    edited = mmforget.erase(pipe, "cat", preserve=["dog"], copy=False)
    assert edited is pipe
    assert state_hash(pipe.unet) != before


def test_takes_a_generator_a_folder_and_a_concept(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    found = [
        mmforget.erase(DiffusionGenerator(pipe), CAT),
        mmforget.erase(tmp_path, [CAT]),
        mmforget.erase(str(tmp_path), CAT, method="UCE"),
        mmforget.erase(pipe, CAT, method=find_method("uce")),
        mmforget.erase(pipe, CAT, method="mmforget.methods.uce.UCE"),
    ]
    assert len({state_hash(one.unet) for one in found}) == 1


def test_a_method_that_trains(pipe: Any) -> None:
    before = state_hash(pipe.unet)
    settings = FAST["esd"] | {"lr": 1e-3}
    edited = mmforget.erase(pipe, CAT, method="esd", steps=2, progress=False, **settings)
    assert state_hash(edited.unet) != before
    assert not edited.unet.training
    assert all(torch.isfinite(p).all() for p in edited.unet.parameters())


def test_one_after_another_carries_what_a_method_needs(pipe: Any) -> None:
    concepts = [CAT, ConceptSpec("church", preserve=("dog", "a tree"))]
    generator = DiffusionGenerator(pipe)
    done = run_erasure(generator, concepts, "uce", sequence=True)
    assert [one.concepts[-1] for one in done.methods] == concepts
    first = run_erasure(generator, concepts[:1], "uce").model
    assert state_hash(first.network) != state_hash(done.model.network)
    assert done.cost["seconds"] > 0
    edited = mmforget.erase(pipe, concepts, sequence=True)
    assert state_hash(edited.unet) == state_hash(done.model.network)


def test_the_module_of_the_same_name_can_be_called(pipe: Any) -> None:
    code = "import mmforget.erase, mmforget; print(callable(mmforget.erase))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, mmforget.erase; assert not {'torch', 'diffusers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"method": "ucee"}, ConfigurationError, "`method` is 'ucee'; did you mean 'uce'?"),
        ({"method": "no.such.Class"}, ConfigurationError, "there is no class 'no.such.Class'"),
        ({"method": "mmforget.methods.ssd.SSD"}, ConfigurationError, "erases no concepts"),
        ({"method": "sld"}, ConfigurationError, "mmforget.SLD(mmforget.load_generator(...)"),
        ({"scop": "last"}, ConfigurationError, "UCE has no setting 'scop'; did you mean 'scope'?"),
        ({"steps": 3}, ConfigurationError, "`steps` is 3, but UCE does not train"),
        ({"method": "esd", "steps": 0, **FAST["esd"]}, ConfigurationError, "at least 1"),
        ({"anchor": "a cat"}, RequestError, "`concept.anchor` is 'a cat', which contains"),
        ({"preserve": ["cat"]}, RequestError, "either erased or preserved"),
        ({"preserve": "dog"}, RequestError, "must be a list"),
        ({"concept": "cat " * 20}, RequestError, "tokens, the text encoder reads 16"),
        ({"concept": ["cat", "cat"]}, RequestError, "erases 'cat' twice"),
        ({"concept": []}, RequestError, "name at least one concept"),
        ({"concept": ["cat", "dog"], "synonyms": ["kitty"]}, RequestError, "unclear whose"),
        ({"concept": CAT, "preserve": ["dog"]}, RequestError, "beside a ConceptSpec"),
        ({"pipeline": "./nothing"}, MissingFileError, "is no diffusers pipeline"),
        ({"pipeline": torch.nn.Linear(1, 1)}, ModelError, "`pipeline` is a Linear"),
    ],
    ids=lambda value: None if isinstance(value, type) else "",
)
def test_mistakes_are_named(
    pipe: Any, call: dict[str, Any], error: type[Exception], text: str
) -> None:
    arguments: dict[str, Any] = {"pipeline": pipe, "concept": "cat", "progress": False, **call}
    with pytest.raises(error) as caught:
        mmforget.erase(**arguments)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_precision_on_the_cpu_is_refused_where_it_cannot_work(pipe: Any) -> None:
    pipe.unet.to(torch.float16)
    with pytest.raises(ModelError, match="needs single precision"):
        mmforget.erase(pipe, CAT, method="esd", steps=1)


def test_auto_chooses_by_family_and_kind(pipe: Any) -> None:
    generator = DiffusionGenerator(pipe)
    assert automatic(generator, [CAT]) == "uce"
    assert automatic(generator, [ConceptSpec("blood", kind="unsafe")]) == "esd"
    assert automatic(DiffusionGenerator(tiny_pipeline("sd3")), [CAT]) == "esd"
    edited = mmforget.erase(pipe, CAT, method="auto")
    assert state_hash(edited.unet) == state_hash(mmforget.erase(pipe, CAT).unet)


@pytest.mark.parametrize("name", METHODS)
def test_every_short_name_is_a_method(name: str) -> None:
    assert find_method(name).__name__ == METHODS[name].partition(":")[2]


def test_a_closed_form_runs_without_a_trainer(pipe: Any) -> None:
    method = find_method("uce")(DiffusionGenerator(pipe), CAT)
    assert run_method(method) is method.model


# ---- requests ------------------------------------------------------------------------------------


def test_a_request_for_concepts() -> None:
    request = ForgetRequest(concepts=(CAT, ConceptSpec("Café «X»", kind="style")))
    assert request.name == "erase-cat-cafe-x"
    assert request.goal == "concept_removal"
    assert ForgetRequest.from_dict(request.to_dict()) == request
    assert ForgetRequest(concepts=(CAT,)).hash != request.hash
    many = tuple(ConceptSpec(f"a rather long name {number}") for number in range(4))
    assert ForgetRequest(concepts=many).name == "erase-4-concepts"
    assert ForgetRequest(concepts=(ConceptSpec("猫"),)).name.startswith("erase-concept-")


def test_requests_for_classes_hash_as_before() -> None:
    assert "concepts" not in ForgetRequest(classes=(3,)).to_dict()


def test_contradictory_requests() -> None:
    with pytest.raises(RequestError, match="got neither"):
        ForgetRequest()
    with pytest.raises(RequestError, match="got both `classes` and `concepts`"):
        ForgetRequest(classes=(3,), concepts=(CAT,))
    with pytest.raises(RequestError, match="erases 'cat' twice"):
        ForgetRequest(concepts=(CAT, CAT))


def test_labelled_data_refuses_concepts() -> None:
    with pytest.raises(RequestError, match="names concepts, which labelled data does not have"):
        make_split({}, ("a", "b"), [ForgetRequest(concepts=(CAT,))], Limits(), 0)


def test_words_and_specifications_can_be_mixed() -> None:
    made = as_concepts(["tree", CAT], preserve=["car"], kind="style", templates=["{}"])
    assert made[0] == ConceptSpec("tree", (), "style", None, ("car",), ("{}",))
    assert made[1] is CAT
