"""Reading diffusers pipelines from folders or the hub, so that nothing goes wrong unsaid."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmforget.errors import MissingFileError, ModelError, WeightsError


def read_pipeline(
    source: str | Path, supported: Sequence[str], torch_dtype: torch.dtype, **settings: Any
) -> Any:
    """Load a pipeline with all its weights, from safetensors only.

    Args:
        source: local folder or hub id.
        supported: class names of the pipelines that are accepted.
        torch_dtype: precision of the weights.
        settings: further arguments of `DiffusionPipeline.from_pretrained`.

    Raises:
        MissingFileError: a local path that is no diffusers folder, or an unreachable hub id.
        ModelError: another kind of pipeline.
        WeightsError: broken or missing weights, or weights in a format that can execute code.
    """
    from diffusers import DiffusionPipeline

    path = Path(source).expanduser()
    local = path.exists() or str(source).startswith((".", "/", "~"))
    if local:
        index = _index(path, source)
        name = index["_class_name"]
        # A part that was left out, such as SD3's third text encoder, must be left out explicitly.
        settings = {key: None for key, value in index.items() if value == [None, None]} | settings
        if name not in supported:
            raise ModelError(
                f"'{source}' holds a {name}, which is no supported text-to-image pipeline; "
                f"supported are {', '.join(supported)}"
            )
    said: list[str] = []
    try:
        with captured() as said:
            pipeline = DiffusionPipeline.from_pretrained(
                str(path) if local else str(source),
                torch_dtype=torch_dtype,
                use_safetensors=True,
                **settings,
            )
    except Exception as error:  # the libraries raise many kinds for broken files
        reason = _fault(said) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not local:
            raise MissingFileError(
                f"'{source}' is neither a folder nor a pipeline that can be had from the hub "
                f"({_short(reason)}); check the name and the connection"
            ) from error
        raise WeightsError(
            f"the pipeline '{source}' cannot be loaded ({_short(reason)}); check that its files "
            "are complete and in safetensors format"
        ) from error
    if fault := _fault(said):
        # diffusers and transformers draw missing weights at random, and only warn.
        raise WeightsError(
            f"the pipeline '{source}' is not complete ({_short(fault)}); download or save it again"
        )
    return pipeline


def _index(folder: Path, source: str | Path) -> dict[str, Any]:
    """The parts of the pipeline in a local folder."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise MissingFileError(
            f"'{source}' is no diffusers pipeline (it has no model_index.json); give a folder "
            "written by `pipe.save_pretrained`, or a hub id"
        )
    try:
        found: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        found["_class_name"] = str(found["_class_name"])
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"'{index}' is damaged, it names no pipeline; download or save it again"
        ) from error


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Take what diffusers and transformers print while they load or save, instead of showing it."""
    import diffusers.utils.logging
    import transformers.utils.logging

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # On a terminal, transformers colours its reports.
            texts.append(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))

    texts: list[str] = []
    listener = Listener(logging.WARNING)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)
        for library in (diffusers, transformers):
            tools: Any = library.utils.logging
            logger = logging.getLogger(library.__name__)
            stack.callback(setattr, logger, "handlers", logger.handlers)
            stack.callback(setattr, logger, "propagate", logger.propagate)
            stack.callback(logger.setLevel, logger.level)
            logger.handlers, logger.propagate = [listener], False
            logger.setLevel(logging.WARNING)
            if getattr(tools, "_tqdm_active", True):
                stack.callback(tools.enable_progress_bar)
                tools.disable_progress_bar()
        yield texts
    for text in texts:
        logging.getLogger(__name__).debug("%s", text)


def _fault(said: Sequence[str]) -> str | None:
    """The first weight that does not come from the files, by what the libraries said."""
    for text in said:
        new = re.search(r"newly initialized[^\[]*\[(.+?)\]", text, re.DOTALL)
        if new:
            return f"missing are {new[1]}"
        row = re.search(r"^(\S+)\s*\| (MISSING|MISMATCH)\b", text, re.MULTILINE)
        if row:
            return f"'{row[1]}' is missing or has another shape"
    return None


def _short(reason: str) -> str:
    first = re.split(r"(?<=\S)\.\s", reason + " ")[0].strip().rstrip(".")
    return first if len(first) <= 200 else first[:200] + "…"
