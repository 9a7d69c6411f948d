"""Memorized prompts, and the training pictures that belong to them, from local files.

Nothing is downloaded. The 500 prompts of Stable Diffusion 1 that most papers report on are public
in two forms, both of which are read as they are:

* ``sdv1_500_memorized.jsonl`` (Wen et al.): lines with ``caption``, ``index`` and ``url``. Its
  pictures lie in ``gt_images/INDEX/``, often several per prompt; give that folder as `images`.
* ``memorized_laion_prompts.csv`` (Hintersdorf et al., MIT licence): the same rows separated by
  semicolons, with the columns ``Caption``, ``URL``, ``type`` (``VM`` verbatim, ``TM`` template) and
  ``Index``. Its pictures are named by the row, ``0000_title.jpg`` first.

The pictures belong to others, and many of their addresses are dead: two groups that tried could
fetch 454 and 417 of 500.

Reference:
    Webster, "A Reproducible Extraction of Training Images from Diffusion Models", 2023,
    arXiv:2305.08694; Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in
    Diffusion Models", 2024, arXiv:2407.21720; Hintersdorf, Struppek, Kersting, Dziedzic, Boenisch,
    "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models", 2024,
    arXiv:2406.02366.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmforget.artifacts.run_folder import atomic_write, writing
from mmforget.concept import normalised
from mmforget.data.memorized import Captioned, Coverage, MemorizedPrompt, MemorizedSet
from mmforget.data.memorized_lists import ListedPrompt, listed_prompts
from mmforget.data.memorized_pictures import (
    OnMissing,
    PictureReader,
    all_pictures,
    captioned_pictures,
)
from mmforget.errors import ConfigurationError, DataError, suggest

logger = logging.getLogger(__name__)

SET_FILE = "memorized.json"
PICTURES_FILE = "pictures.safetensors"
FORMAT_VERSION = 1


def load_memorized(
    path: str | Path,
    *,
    images: str | Path | None = None,
    retain: Captioned | str | Path | None = None,
    test: Captioned | str | Path | None = None,
    controls: Tensor | str | Path | None = None,
    size: int | None = None,
    on_missing: OnMissing = "raise",
) -> MemorizedSet:
    """Read memorized prompts, with their training pictures where they can be had.

    Args:
        path: a list (``.csv``, ``.tsv``, ``.json``, ``.jsonl``, or ``.txt`` with a prompt per
            line); a folder with pictures and a ``.txt`` of the same name beside each; or a folder
            that `save_memorized` wrote. Lines with the same prompt are joined.
        images: folder of the pictures of a list. If the list names files, they lie below it, else
            each row's are found by what most rows agree on: a folder or a file called like the
            row's ``index``, the file name at the end of its ``url``, or the number of the row, from
            0, at the beginning of the name. None: no pictures, unless the list names files, which
            then lie beside it.
        retain: prompts, and pictures, that are not memorized and may be used for repair; a path is
            read by `load_captioned`.
        test: the same, for measurements only.
        controls: (K, 3, H, W) float in [0, 1], or a folder of pictures, like the memorized ones but
            never trained on.
        size: side in pixels to which all pictures are cropped around their centres and resized;
            None keeps sizes, which must then be equal.
        on_missing: ``raise``, or ``skip`` pictures that are missing or cannot be read; prompts
            without a picture stay, and `MemorizedSet.coverage` counts.

    Raises:
        MissingFileError: no such file or folder.
        DataError: a list that cannot be read or has no prompts, pictures that are missing, of
            different sizes, or that nothing in the list points to.
        ConfigurationError: a setting out of range, or `images` beside a folder with pictures.
        RequestError: see `MemorizedSet`.
    """
    path = Path(path).expanduser()
    _check(size, on_missing)
    further: dict[str, Any] = {
        "retain": _captioned(retain, size, on_missing),
        "test": _captioned(test, size, on_missing),
        "controls": controls
        if controls is None or isinstance(controls, Tensor)
        else all_pictures(Path(controls).expanduser(), size),
    }
    further = {key: value for key, value in further.items() if value is not None}
    if images is not None and path.is_dir():
        raise ConfigurationError(
            f"`images` is '{images}', but the folder '{path}' holds its own pictures; leave it out"
        )
    if (path / SET_FILE).is_file():
        return replace(_saved(path, size), **further)
    rows = captioned_pictures(path) if path.is_dir() else listed_prompts(path)
    memorized = [row for row in rows if row.kind is not None]
    if not memorized:
        raise DataError(f"'{path}' has no memorized prompts; check that it is the right list")
    reader = PictureReader(size)
    named, missing = reader.read(path, images, rows, memorized, on_missing)
    prompts, duplicates = _joined(memorized, named)
    usable = sum(bool(one.images) for one in prompts)
    found = MemorizedSet(
        prompts=tuple(prompts),
        images=reader.images,
        source=str(path),
        coverage=Coverage(len(prompts), usable, tuple(missing), tuple(duplicates)),
        **further,
    )
    logger.info("%s: %s", path.name, found.coverage)
    return found


def load_captioned(
    path: str | Path,
    *,
    images: str | Path | None = None,
    size: int | None = None,
    on_missing: OnMissing = "raise",
) -> Captioned:
    """Read prompts that are not memorized, with their pictures if there are any.

    Args:
        path: see `load_memorized`; without a folder that `save_memorized` wrote.
        images: see `load_memorized`.
        size: see `load_memorized`.
        on_missing: ``raise``, or ``skip`` prompts whose pictures are missing.

    Raises:
        MissingFileError: no such file or folder.
        DataError: see `load_memorized`.
        ConfigurationError: a setting out of range.
    """
    path = Path(path).expanduser()
    _check(size, on_missing)
    rows = captioned_pictures(path) if path.is_dir() else listed_prompts(path)
    reader = PictureReader(size)
    named, _ = reader.read(path, images, rows, rows, on_missing)
    if not reader.images:
        return Captioned(tuple(row.prompt for row in rows))
    pairs = [(row.prompt, name) for row, names in zip(rows, named, strict=True) for name in names]
    pictures = torch.stack([reader.images[name] for _, name in pairs])
    return Captioned(tuple(prompt for prompt, _ in pairs), pictures)


def resolve(name: str | Path, **settings: Any) -> MemorizedSet:
    """The memorized set that a name means.

    Args:
        name: ``planted`` for `mmforget.data.planted.planted_memories`, else a path.
        settings: see `load_memorized`.

    Raises:
        ConfigurationError: pictures beside ``planted``, which has its own, or another size.
        MissingFileError: see `load_memorized`, and all else that it raises.
    """
    if str(name) != "planted":
        return load_memorized(name, **settings)
    from mmforget.data.planted import SHEET, planted_memories

    size = settings.pop("size", None)
    if size not in (None, SHEET):
        raise ConfigurationError(f"`size` is {size}, but the pictures of 'planted' are {SHEET}")
    settings.pop("on_missing", None)  # nothing can be missing
    given = [key for key, value in settings.items() if value is not None]
    if given:
        raise ConfigurationError(f"'planted' has everything of its own; leave `{given[0]}` out")
    return planted_memories()


# ---- a folder of ours ---------------------------------------------------------------------------


def save_memorized(memorized: MemorizedSet, folder: str | Path) -> Path:
    """Write a set into a folder, from which `load_memorized` reads it back bit by bit.

    Args:
        memorized: the set.
        folder: made if it is not there. Pictures go into a safetensors file, all else into JSON.

    Returns:
        The folder.

    Raises:
        StorageError: the files could not be written.
    """
    folder = Path(folder).expanduser()
    tensors = {f"image/{name}": image for name, image in memorized.images.items()}
    tensors |= {f"region/{name}": part for name, part in memorized.regions.items()}
    for key, one in (("retain", memorized.retain), ("test", memorized.test)):
        if one.images is not None:
            tensors[key] = one.images
    if memorized.controls is not None:
        tensors["controls"] = memorized.controls
    assert memorized.coverage is not None  # derived by the set
    data = {
        "format_version": FORMAT_VERSION,
        "source": memorized.source,
        "hash": memorized.hash,
        "coverage": asdict(memorized.coverage),
        "prompts": [asdict(one) for one in memorized.prompts],
        "retain": list(memorized.retain.prompts),
        "test": list(memorized.test.prompts),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Copied, because several entries can be views of one tensor, which safetensors refuses.
    plain = {key: _narrow(value.detach().cpu()).clone() for key, value in tensors.items()}
    atomic_write(folder / PICTURES_FILE, save(plain))
    atomic_write(folder / SET_FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return folder


def _narrow(value: Tensor) -> Tensor:
    """Eight bits where they hold exactly what is there, as they do for decoded files."""
    if value.dtype != torch.float32:
        return value.contiguous()
    levels = (value.clamp(0, 1) * 255).round().to(torch.uint8)
    return (levels if torch.equal(_widened(levels), value) else value).contiguous()


def _widened(value: Tensor) -> Tensor:
    return value.float() / 255 if value.dtype == torch.uint8 else value


def _saved(folder: Path, size: int | None) -> MemorizedSet:
    try:
        data = json.loads((folder / SET_FILE).read_text(encoding="utf-8"))
        version = data["format_version"]
        if version == FORMAT_VERSION:
            tensors = load_file(folder / PICTURES_FILE)
            found = _rebuilt(data, {key: _widened(value) for key, value in tensors.items()})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            f"'{folder}' is no intact memorized set ({error}); copy it again"
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"'{folder}' has format version {version}, this mmforget reads {FORMAT_VERSION}; "
            "update mmforget, or save the set again"
        )
    if found.hash != data["hash"]:
        raise DataError(
            f"the prompts or pictures in '{folder}' were changed after they were saved; save the "
            "set again"
        )
    sides = {tuple(image.shape[1:]) for image in found.images.values()}
    if size is not None and sides - {(size, size)}:
        shown = "x".join(map(str, sorted(sides)[0]))
        raise DataError(
            f"the pictures in '{folder}' are {shown}, `size` is {size}; leave it out, or save the "
            "set from its source again"
        )
    return found


def _rebuilt(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MemorizedSet:
    def below(start: str) -> dict[str, Tensor]:
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    listed, lost = data["coverage"], ("missing", "duplicates")
    return MemorizedSet(
        prompts=tuple(MemorizedPrompt(**one) for one in data["prompts"]),
        images=below("image/"),
        regions=below("region/"),
        retain=Captioned(tuple(data["retain"]), tensors.get("retain")),
        test=Captioned(tuple(data["test"]), tensors.get("test")),
        controls=tensors.get("controls"),
        source=data["source"],
        coverage=Coverage(**listed | {key: tuple(listed[key]) for key in lost}),
    )


def _joined(
    rows: Sequence[ListedPrompt], named: Sequence[tuple[str, ...]]
) -> tuple[list[MemorizedPrompt], list[str]]:
    """One entry per prompt, and the prompts that came more than once."""
    found: dict[str, MemorizedPrompt] = {}
    duplicates: dict[str, str] = {}
    for row, names in zip(rows, named, strict=True):
        assert row.kind is not None  # those rows were left out
        key = normalised(row.prompt)
        if key not in found:
            found[key] = MemorizedPrompt(row.prompt, names, row.kind)
            continue
        first = found[key]
        duplicates[key] = first.prompt
        kinds = {first.kind, row.kind} - {"unknown"}
        found[key] = MemorizedPrompt(
            first.prompt,
            tuple(dict.fromkeys([*first.images, *names])),
            kinds.pop() if len(kinds) == 1 else "unknown",
        )
    return list(found.values()), list(duplicates.values())


def _captioned(
    given: Captioned | str | Path | None, size: int | None, on_missing: OnMissing
) -> Captioned | None:
    if given is None or isinstance(given, Captioned):
        return given
    return load_captioned(given, size=size, on_missing=on_missing)


def _check(size: int | None, on_missing: str) -> None:
    if size is not None and size < 1:
        raise ConfigurationError(f"`size` is {size}, it must be at least 1 or left out")
    if on_missing not in get_args(OnMissing):
        raise ConfigurationError(
            f"`on_missing` is '{on_missing}', {suggest(on_missing, get_args(OnMissing))}"
        )
