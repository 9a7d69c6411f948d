"""Load a trained model of whichever family its folder says."""

from __future__ import annotations

from pathlib import Path

from mmforget.models.base import Model
from mmforget.models.classifier import HUB_ID, load_classifier
from mmforget.models.detector import load_detector
from mmforget.models.detector_files import is_detector
from mmforget.models.native import hub_folder
from mmforget.models.translated_detector import SETTINGS_FILE, load_translated


def load_trained(source: str | Path) -> Model:
    """Load a classifier, a detector or a translated detector, in evaluation mode.

    Args:
        source: a folder saved by its library or by mmforget, or a hub id ``owner/name``. Files of
            weights alone say nothing about their family: use `load_classifier` or `load_detector`.

    Raises:
        MissingFileError, WeightsError, ModelError: see `load_classifier` and `load_detector`.
    """
    path = Path(source).expanduser()
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = hub_folder(str(source))
    if (path / SETTINGS_FILE).is_file():
        return load_translated(path)
    if path.is_dir() and is_detector(path):
        return load_detector(path)
    return load_classifier(path)
