"""Saving a treated pipeline: diffusers format, what was changed, manifest, card, report, ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.run_files import finish

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.artifacts.run_folder import RunFolder
    from mmforget.audit.results import Results
    from mmforget.data.memorized import MemorizedSet
    from mmforget.models.diffusion import DiffusionGenerator


class Treated:
    """What `save_artifact` writes: the pipeline, and files beside it.

    Args:
        model: the pipeline.
        beside: writes further files into the folder of the pipeline.
    """

    def __init__(
        self, model: DiffusionGenerator, beside: Callable[[Path], Any] | None = None
    ) -> None:
        self._model, self._beside = model, beside

    def state_dict(self) -> dict[str, Any]:
        """Of the treated model, for its hash."""
        return self._model.state_dict()

    def save_native(self, folder: Path) -> None:
        """Write the pipeline, and what belongs to it."""
        self._model.save_native(folder)
        if self._beside is not None:
            self._beside(folder)


def save(
    folder: RunFolder,
    given: Namespace,
    config: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Any],
    model: DiffusionGenerator,
    memorized: MemorizedSet,
    results: Results,
    base_hash: str,
    adapter: Callable[[Path], None],
    beside: Callable[[Path], Any] | None = None,
) -> None:
    """Write everything that the run leaves behind.

    Args:
        folder: the open run.
        given: the command line.
        config: its complete settings.
        method: class name.
        settings: of the method.
        model: the treated pipeline.
        memorized: what it was treated for.
        results: of the audit.
        base_hash: of the pipeline before.
        adapter: writes the change by itself.
        beside: writes further files beside the pipeline.

    Raises:
        StorageError: a file could not be written.
    """
    from mmforget.artifacts.manifest import Manifest, config_hash
    from mmforget.artifacts.model_card import model_card
    from mmforget.artifacts.save import save_artifact

    request = memorized.request
    manifest = Manifest(
        base_model=given.pipeline,
        base_hash=base_hash,
        method=method,
        settings=dict(settings),
        config_hash=config_hash(config),
        request_hashes=(request.hash,),
        data_hash=str(results.data["hash"]),
        split_hash=str(results.data["split_hash"]),
        seeds={"method": given.seed},
    )
    saved = save_artifact(
        Treated(model, beside),  # type: ignore[arg-type]
        folder.work / "artifact",
        manifest,
        model_card(manifest, [request], results, library="diffusers"),
        adapters={request.name: adapter},
    )
    entry = {
        "method": saved.method, "base_hash": saved.base_hash, "result_hash": saved.result_hash
    }  # fmt: skip
    finish(folder, config, [request], results, given.ledger, entry)
