"""What the commands on text-to-image pipelines share: names, loading, settings on the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.errors import ConfigurationError, MissingFileError, ModelError, suggest

if TYPE_CHECKING:
    from mmforget.models.diffusion import DiffusionGenerator

WORLD = {
    "digit_world": "digit_world/diffusion_unet",
    "digit_world_transformer": "digit_world/diffusion_transformer",
}
"""Shipped pipelines that draw single digits; the shipped judge reads their pictures."""

PLANTED = {
    "planted": "digit_world/memorizing_unet",
    "planted_transformer": "digit_world/memorizing_transformer",
}
"""Shipped pipelines with planted memories."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {"planted_transformer": {"max_sequence_length": 8}}
"""What a shipped pipeline is loaded with: so many rows took the place of T5 in its training."""

SHIPPED = WORLD | PLANTED

DTYPES = ("float32", "float16", "bfloat16")

MISSED = 3
"""Exit code where a requirement is not met."""


def check_dtype(name: str) -> None:
    """Refuse an unknown precision.

    Raises:
        ConfigurationError: names the nearest.
    """
    if name not in DTYPES:
        raise ConfigurationError(f"`--dtype` is '{name}', {suggest(name, DTYPES)}")


def read_defaults(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a YAML file gives.

    Raises:
        MissingFileError: there is no such file.
        ConfigurationError: no mapping, an unknown key, or a value where a list belongs.
    """
    import yaml

    path = Path(name)
    if not path.is_file():
        raise MissingFileError(f"there is no configuration file '{name}'; check the path")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"'{name}' is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"'{name}' holds no mapping; write `concept: [...]` and so on")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key, value in values.items():
        if key not in known or key == "config":
            raise ConfigurationError(f"'{name}' has the key '{key}'; {suggest(key, known)}")
        if isinstance(known[key], list) != isinstance(value, list):
            wanted = "a list" if isinstance(known[key], list) else "a single value"
            raise ConfigurationError(f"'{name}' has `{key}: {value}`; give {wanted}")
    return values


def settings_of(pairs: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """``name=value`` as a mapping; values are read as YAML reads them.

    Raises:
        ConfigurationError: no ``=``, or a name twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError(f"`{option}` is '{pair}'; write NAME=VALUE, such as 'eta=1'")
        if name in found:
            raise ConfigurationError(f"`{option}` gives '{name}' twice; remove one")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value
        if isinstance(found[name], str):
            found[name] = _number(found[name])
    return found


def _number(text: str) -> str | float:
    """YAML reads 1e-4 as a text."""
    try:
        return float(text)
    except ValueError:
        return text


def pipeline_folder(name: str) -> str:
    """Resolve the names of the shipped pipelines; everything else stays.

    Raises:
        MissingFileError: a shipped pipeline that is not installed.
    """
    if name not in SHIPPED:
        return name
    from importlib import resources

    folder = Path(str(resources.files("mmforget") / "assets" / SHIPPED[name]))
    if not (folder / "model_index.json").is_file():
        raise MissingFileError(f"the pipeline '{name}' is not installed; reinstall mmforget")
    return str(folder)


def load_pipeline(
    name: str,
    device: str | None = None,
    dtype: str = "float32",
    steps: int | None = None,
    guidance: float | None = None,
    after: Sequence[str] = (),
) -> DiffusionGenerator:
    """Load a pipeline, apply earlier edits, and move it.

    Args:
        name: a diffusers folder, a hub id or a name of `SHIPPED`.
        device: None takes a GPU if there is one.
        dtype: one of `DTYPES`.
        steps: of the sampler; None takes 20.
        guidance: None takes what is usual, see `guidance_of`.
        after: files of earlier edits, in order.

    Raises:
        MMForgetError: see `load_generator` and `WeightEdit.apply`.
    """
    import torch

    from mmforget.models.diffusion import load_generator
    from mmforget.models.weight_edit import WeightEdit

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "float32" and device == "cpu":
        raise ModelError(
            f"`--dtype` is '{dtype}', but the CPU needs float32; leave it out or use a GPU"
        )
    edits = [WeightEdit.load(path) for path in after]
    model = load_generator(
        pipeline_folder(name),
        torch_dtype=getattr(torch, dtype),
        steps=steps or 20,
        guidance=guidance_of(name, guidance),
        **SETTINGS.get(name, {}),
    )
    for number, edit in enumerate(edits):
        edit.apply(model, check_base=number == 0)  # the others were made for what came before them
    model.pipeline.set_progress_bar_config(disable=True)
    return model.to(device)


def guidance_of(name: str, given: float | None) -> float:
    """The scale that was given, or what is usual for a pipeline."""
    if given is not None:
        return given
    return 3.0 if name in SHIPPED else 7.5
