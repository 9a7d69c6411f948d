"""What every run on a generator leaves behind: its files, its ledger entry, its last words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmforget.cli.pipelines import MISSED
from mmforget.errors import ConfigurationError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.artifacts.run_folder import RunFolder
    from mmforget.audit.results import Results
    from mmforget.request import ForgetRequest


def check_formats(given: Namespace, formats: Sequence[str]) -> None:
    """Refuse formats that do not exist, and a copy where something lies already.

    Args:
        given: with `format` and `save`.
        formats: those that there are.

    Raises:
        ConfigurationError: see above.
    """
    for name in given.format:
        if name not in formats:
            raise ConfigurationError(f"`--format` is '{name}', {suggest(name, formats)}")
    if given.save and Path(given.save).exists():
        raise ConfigurationError(f"`--save` is '{given.save}', which exists; choose another name")


def write_erasure(
    folder: RunFolder,
    given: Namespace,
    base_model: str,
    base_hash: str,
    method: str,
    settings: Mapping[str, Any],
    model: Any,
    requests: Sequence[ForgetRequest],
    results: Results | None,
    library: str,
    adapters: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Save what `mmforget erase` made, with everything that a run leaves behind.

    Args:
        folder: open.
        given: the command line.
        base_model: what was erased from, as it was named.
        base_hash: of its weights.
        method: class name.
        settings: of the method.
        model: what `save_artifact` writes.
        requests: what was asked.
        results: None if nothing was measured.
        library: that reads the artifact, for the model card.
        adapters: see `save_artifact`.

    Raises:
        StorageError: a file could not be written.
    """
    from mmforget.artifacts.manifest import Manifest, config_hash
    from mmforget.artifacts.model_card import model_card
    from mmforget.artifacts.save import save_artifact

    where = ("config", "run", "overwrite", "no_open", "quiet", "save", "ledger")
    config = {k: v for k, v in vars(given).items() if k not in where and v not in (None, [])}
    data = results.data if results is not None else {}
    manifest = Manifest(
        base_model=base_model,
        base_hash=base_hash,
        method=method,
        settings=dict(settings) | ({"steps": given.steps} if given.steps else {}),
        config_hash=config_hash(config),
        request_hashes=tuple(request.hash for request in requests),
        data_hash=str(data.get("hash", "")),
        split_hash=str(data.get("split_hash", "")),
        seeds={"method": given.seed},
    )
    saved = save_artifact(
        model,
        folder.work / "artifact",
        manifest,
        model_card(manifest, requests, results, library=library),
        adapters=adapters,
    )
    entry = {
        "method": saved.method, "base_hash": saved.base_hash, "result_hash": saved.result_hash
    }  # fmt: skip
    finish(folder, config, requests, results, given.ledger, entry)


def finish(
    folder: RunFolder,
    config: Mapping[str, Any],
    requests: Sequence[ForgetRequest],
    results: Results | None,
    ledger: str | None,
    entry: Mapping[str, Any],
) -> None:
    """Write configuration, requests, results and report, give the run its name, and enter it.

    Args:
        folder: open; its artifact, if there is one, is in place.
        config: complete, plain data.
        requests: what was asked.
        results: None if nothing was measured.
        ledger: its file; None takes ``ledger.jsonl`` beside the run.
        entry: what the ledger says besides, such as ``method`` and hashes.

    Raises:
        StorageError: a file could not be written.
    """
    import json
    import os

    import yaml

    from mmforget.artifacts.ledger import Ledger
    from mmforget.artifacts.manifest import manifest_hash
    from mmforget.artifacts.run_folder import atomic_write
    from mmforget.report.write import write_report

    asked = [request.to_dict() | {"hash": request.hash} for request in requests]
    atomic_write(
        folder.work / "config.yaml",
        yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )
    atomic_write(
        folder.work / "request.json", json.dumps({"requests": asked}, indent=1, ensure_ascii=False)
    )
    if results is not None:
        atomic_write(folder.work / "results.json", results.to_json())
        write_report([results], folder.work)
    folder.commit()
    book = Ledger(ledger or folder.path.parent / "ledger.jsonl")
    artifact = folder.path / "artifact"
    facts: dict[str, Any] = {"run": folder.path.name}
    if artifact.is_dir():
        facts["artifact"] = os.path.relpath(artifact, book.path.parent)
        facts["manifest"] = manifest_hash(artifact)
    verdict = results.verdict.outcome if results else "not audited"
    book.append(facts | {"requests": asked, **entry, "verdict": verdict})


@contextmanager
def emptied_on_failure(folder: RunFolder) -> Iterator[None]:
    """Leave nothing half-written in a run folder that is open."""
    from mmforget.artifacts.run_folder import LOCK_NAME

    try:
        yield
    except BaseException:
        for entry in folder.work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK_NAME:
                entry.unlink()
        raise


def announce(
    folder: RunFolder,
    results: Results | None,
    columns: Sequence[tuple[str, str, str]],
    missed: Sequence[str],
    save: str | None,
    show: bool,
) -> int:
    """Print what came out and where it lies.

    Args:
        folder: committed.
        results: None if nothing was measured.
        columns: of the table, see `mmforget.cli.summary.table`.
        missed: requirements that do not hold.
        save: where a copy of the artifact goes.
        show: open the report, if somebody sits at the terminal.

    Returns:
        Exit code.
    """
    if results is not None:
        from mmforget.cli.summary import table

        print(f"\n{table(results, columns)}\n\n{results.verdict.sentence}\n")
        print(f"report:   {folder.path / 'report.html'}")
    print(f"artifact: {folder.path / 'artifact'}")
    if save:
        shutil.copytree(folder.path / "artifact", save)
        print(f"copy:     {save}")
    for text in missed:
        print(f"mmforget: {text}", file=sys.stderr)
    if results is not None and show and sys.stdout.isatty():
        import webbrowser

        webbrowser.open((folder.path / "report.html").as_uri())
    return MISSED if missed else 0
