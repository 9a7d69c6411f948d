"""The files that every run on a text-to-image pipeline leaves behind, and its ledger entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmforget.artifacts.run_folder import RunFolder
    from mmforget.audit.results import Results
    from mmforget.request import ForgetRequest


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
