"""One complete run: forget, audit, save, report, and enter it into the ledger."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmforget.artifacts.ledger import Ledger
from mmforget.artifacts.manifest import Manifest, config_hash, manifest_hash
from mmforget.artifacts.model_card import model_card
from mmforget.artifacts.run_folder import LOCK_NAME, RunFolder, atomic_write
from mmforget.artifacts.save import save_artifact
from mmforget.audit.controls import checked_controls, make_controls
from mmforget.audit.families import audit_by_family, check_fits
from mmforget.audit.results import ModelEntry, Results, Role
from mmforget.audit.scene import AuditedModel, AuditSettings
from mmforget.data.base import ForgetDataModule
from mmforget.models.base import Answers, Model, state_hash
from mmforget.models.loading import load_trained
from mmforget.report import write_report
from mmforget.request import ForgetRequest
from mmforget.sequence import (
    MethodFactory,
    SequenceResult,
    SequenceRunner,
    TrainerFactory,
    first_process,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Where a run is written.

    Args:
        folder: the run folder, which appears when the run is complete.
        resume: continue an unfinished run.
        overwrite: replace an existing run.
        ledger: the ledger file; by default `ledger.jsonl` beside the run folder.
        title: title of the report.
    """

    folder: Path
    resume: bool = False
    overwrite: bool = False
    ledger: Path | None = None
    title: str = ""


@dataclass(frozen=True)
class AuditOptions:
    """What the unlearned model is compared with.

    Args:
        settings: settings of the measurements, of the class that the data asks for; see
            `mmforget.audit.families.settings_for`.
        retrained: sources of retrained models, which never saw the forget set.
        held_out: sources of retrained models that are measured as if they were methods.
        controls: controls that must fail, see `mmforget.audit.controls.make_controls`; None takes
            all that fit the model.
        control_epochs: epochs of the controls that train.
        enabled: switch the audit off; the run then claims nothing.
    """

    settings: Any = field(default_factory=AuditSettings)
    retrained: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    controls: list[str] | None = None
    control_epochs: int = 5
    enabled: bool = True


def forget(
    model: Model,
    method: MethodFactory,
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    trainer: TrainerFactory,
    run: RunOptions,
    audit_options: AuditOptions,
    config: str,
    original_source: str,
) -> Path:
    """Carry out requests on a model and leave behind artifact, results, report and ledger entry.

    Args:
        model: the original model.
        method: makes the forgetting method for a model.
        data: the data module.
        requests: what to forget, in order.
        trainer: makes a Lightning trainer for one request.
        run: where to write.
        audit_options: what to compare with.
        config: the complete resolved configuration, as YAML.
        original_source: where the original model comes from.

    Returns:
        The finished run folder.

    Raises:
        MMForgetError: anything that the user can mend; earlier runs are as they were, and an
            interrupted run can be resumed.
    """
    folder = RunFolder(run.folder, overwrite=run.overwrite, resume=run.resume)
    first = first_process()
    compared = _compared(audit_options)  # loads the models: a wrong path must not cost a run
    for one in compared:
        check_fits(one.model, data)
    checked_controls(model, audit_options.controls)
    runner = SequenceRunner(
        model, method, data, requests, trainer, folder.work / "checkpoints"
    )  # refuses bad requests before a folder is made
    if first:
        folder.open()
    try:
        if first:
            atomic_write(folder.work / "config.yaml", config)
        outcome = runner.run()
        results = _audit(
            model, outcome, data, requests, compared, audit_options, run, original_source
        )
        if first:
            _write(folder, model, outcome, data, requests, results, config, original_source, run)
    except BaseException:
        if first and not resumable(folder.work):
            for entry in folder.work.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != LOCK_NAME:
                    entry.unlink()
        raise
    finally:
        if first:
            folder.close()
    return folder.path


def resumable(work: Path) -> bool:
    """Whether an unfinished run holds anything that a resumed one would not do again."""
    return any(any(work.rglob(name)) for name in ("last.ckpt", "done.json"))


def described(source: str, role: Role, number: int) -> AuditedModel:
    """Load a model from `source` as a member of an audit.

    A file `training.json` beside the weights, as `mmforget fit` writes it, gives its cost.
    """
    path = Path(source)
    note = path / "training.json"
    cost = json.loads(note.read_text()).get("cost", {}) if note.is_file() else {}
    name = f"{'held-out retrained' if role == 'held_out' else role} {number}"
    model = load_trained(source)
    entry = ModelEntry(name=name, role=role, hash=state_hash(model), source=source, cost=cost)
    return AuditedModel(entry, model)


def _compared(options: AuditOptions) -> list[AuditedModel]:
    if not options.enabled:
        return []
    models = [described(s, "retrained", i) for i, s in enumerate(options.retrained, start=1)]
    return models + [described(s, "held_out", i) for i, s in enumerate(options.held_out, start=1)]


def _audit(
    model: Model,
    outcome: SequenceResult,
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    compared: Sequence[AuditedModel],
    options: AuditOptions,
    run: RunOptions,
    original_source: str,
) -> Results | None:
    if not options.enabled:
        return None
    last = outcome.steps[-1]
    data.request(*requests)
    models = [
        AuditedModel(
            ModelEntry("original", "original", hash=state_hash(model), source=original_source),
            model,
        ),
        AuditedModel(
            ModelEntry(
                "unlearned",
                "unlearned",
                hash=state_hash(outcome.model),
                source="this run",
                method=last.method,
                access=last.access,
                cost=outcome.cost(),
                details={step.request.name: step.statistics for step in outcome.steps},
            ),
            outcome.model,
        ),
        *compared,
        *make_controls(
            model, data, options.controls, options.settings.seed, options.control_epochs
        ),
    ]
    results = audit_by_family(
        models,
        data,
        requests,
        options.settings,
        title=run.title,
        before=outcome.before,
        sequence=outcome.rows,
        curves={"forgetting": outcome.curve},
    )
    results.warnings += [
        f"request '{step.request.name}' changed no parameter"
        for step in outcome.steps
        if step.no_op
    ]
    return results


def _write(
    folder: RunFolder,
    model: Model,
    outcome: SequenceResult,
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    results: Results | None,
    config: str,
    original_source: str,
    run: RunOptions,
) -> None:
    import yaml

    work = folder.work
    settings: dict[str, Any] = yaml.safe_load(config) or {}
    split = data.request(*requests)
    manifest = Manifest(
        base_model=original_source,
        base_hash=state_hash(model),
        method=outcome.steps[-1].method,
        settings=settings.get("method") or {},
        config_hash=config_hash(settings),
        request_hashes=tuple(request.hash for request in requests),
        data_hash=split.data_hash,
        split_hash=split.hash,
        seeds={"data": data.seed, "method": outcome.steps[-1].seed},
    )
    adapters = {
        step.request.name: _copier(step.adapter)
        for step in outcome.steps
        if step.adapter is not None
    }
    saved = save_artifact(
        outcome.model,
        work / "artifact",
        manifest,
        model_card(manifest, requests, results, library=_library(outcome.model)),
        adapters=adapters,
        overwrite=run.resume,
    )
    body = {
        "requests": [request.to_dict() | {"hash": request.hash} for request in requests],
        "data_hash": split.data_hash,
        "split_hash": split.hash,
    }
    atomic_write(work / "request.json", json.dumps(body, indent=1))
    split.save(work / "split.json")
    if results is not None:
        atomic_write(work / "results.json", results.to_json())
        write_report([results], work)
    shutil.rmtree(work / "checkpoints")
    folder.commit()
    ledger = Ledger(run.ledger or folder.path.parent / "ledger.jsonl")
    artifact = folder.path / "artifact"
    ledger.append(
        {
            "run": folder.path.name,
            "artifact": os.path.relpath(artifact, ledger.path.parent),
            "manifest": manifest_hash(artifact),
            "method": saved.method,
            "requests": [request.to_dict() | {"hash": request.hash} for request in requests],
            "base_hash": saved.base_hash,
            "result_hash": saved.result_hash,
            "verdict": results.verdict.outcome if results else "not audited",
        }
    )


def _library(model: Model) -> str:
    if isinstance(model, Answers):
        return "transformers"
    architecture = getattr(model, "architecture", None)
    return architecture.library if architecture is not None else "pytorch"


def _copier(source: Path) -> Any:
    def copy(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    return copy
