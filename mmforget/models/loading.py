"""Load a trained model of whichever family its folder says."""

from __future__ import annotations

import json
from pathlib import Path

from mmforget.models.base import Model
from mmforget.models.classifier import HUB_ID, load_classifier
from mmforget.models.detector import load_detector
from mmforget.models.detector_files import is_detector
from mmforget.models.multimodal import load_multimodal
from mmforget.models.multimodal_files import is_multimodal
from mmforget.models.native import hub_folder
from mmforget.models.translated_detector import SETTINGS_FILE, load_translated


def load_trained(source: str | Path) -> Model:
    """Load a classifier, a detector or a multimodal language model, in evaluation mode.

    Args:
        source: a folder saved by its library or by mmforget, or a hub id ``owner/name``. Files of
            weights alone say nothing about their family: use `load_classifier` or `load_detector`.
            A detector may have a translator in front of it.

    Raises:
        MissingFileError, WeightsError, ModelError: see `load_classifier`, `load_detector` and
            `load_multimodal`.
    """
    path = Path(source).expanduser()
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = hub_folder(str(source))
    if (path / SETTINGS_FILE).is_file():
        return load_translated(path)
    if path.is_dir() and is_detector(path):
        return load_detector(path)
    if path.is_dir() and (is_multimodal(path) or _answers(path)):
        return load_multimodal(source)  # which names the families that it knows
    return load_classifier(path)


def _answers(folder: Path) -> bool:
    """Whether a folder holds a network of transformers that answers in words, known or not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = config.get("architectures") if isinstance(config, dict) else None
    return any(str(one).endswith("ForConditionalGeneration") for one in named or ())
