"""One request after another: each starts from the result of the last, and can be resumed."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import load_file, load_model, save_file, save_model

from mmforget.artifacts.run_folder import atomic_write
from mmforget.audit.cost import measured
from mmforget.audit.families import check_fits, quality_by_role
from mmforget.data.base import ForgetDataModule
from mmforget.errors import ConfigurationError, RequestError, WeightsError
from mmforget.methods.base import ForgettingMethod, detached_copy
from mmforget.models.base import Model, state_hash
from mmforget.request import ForgetRequest

logger = logging.getLogger(__name__)

MethodFactory = Callable[[Model], ForgettingMethod]


class TrainerFactory(Protocol):
    """Makes a new Lightning trainer; every request needs its own."""

    def __call__(self, **overrides: Any) -> Trainer:
        """Return a trainer with some settings replaced."""
        ...


@dataclass
class Step:
    """What one request left behind.

    Attributes:
        request: the request.
        method: class name of the method.
        rows: accuracy or average precision per split after the request (see `Results.sequence`).
        cost: seconds, sample passes, peak memory.
        statistics: facts that the method reports about itself.
        access: what the method read.
        seed: of the method.
        adapter: folder of this request's adapter, None if the method has none.
        no_op: the method changed nothing.
    """

    request: ForgetRequest
    method: str
    rows: list[dict[str, Any]]
    cost: dict[str, Any]
    statistics: dict[str, Any]
    access: dict[str, Any]
    seed: int = 0
    adapter: Path | None = None
    no_op: bool = False


@dataclass
class SequenceResult:
    """The outcome of a whole sequence.

    Attributes:
        model: the unlearned model after the last request, in eval mode.
        before: the model before the last request; the original for a single one.
        steps: one entry per request.
        rows: accuracies (average precisions of a detector) of the original model, step 0, and after
            each request.
        curve: accuracy on validation data after each epoch.
    """

    model: Model
    before: Model
    steps: list[Step]
    rows: list[dict[str, Any]]
    curve: list[dict[str, Any]] = field(default_factory=list)

    def cost(self) -> dict[str, Any]:
        """Cost of all requests together; peak memory is the largest."""
        keys = {key for step in self.steps for key in step.cost}
        largest = {"peak_memory_bytes"}
        return {
            key: (max if key in largest else sum)(step.cost.get(key, 0) for step in self.steps)
            for key in sorted(keys)
        }


class ResumePoint(Callback):
    """Writes one checkpoint after each epoch; a killed process never leaves half of one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.ckpt"
        self.last_model_path = str(self.path) if self.path.is_file() else ""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write beside the last checkpoint, then replace it in one step."""
        fresh = self.path.with_suffix(".new")
        trainer.save_checkpoint(fresh)
        if trainer.is_global_zero:
            fresh.replace(self.path)
        self.last_model_path = str(self.path)


class ForgettingCurve(Callback):
    """Measures accuracy on the validation split of each role after every epoch.

    Rows go to a file, since a forked training process can hand back nothing else.
    """

    def __init__(self, path: Path, data: ForgetDataModule, step: int) -> None:
        # a copy of its own, since the method restricts the access of the shared one
        self.path, self.data, self.step = path, copy.copy(data), step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append one row per split."""
        assert isinstance(pl_module, ForgettingMethod)
        epoch = trainer.current_epoch + 1
        rows = quality_by_role(pl_module.model, self.data, stage="val")
        if trainer.is_global_zero:
            known = [row for row in read_rows(self.path) if row["epoch"] < epoch]
            known += [
                {"step": self.step, "epoch": epoch, "split": r["split"], "accuracy": r["accuracy"]}
                for r in rows
            ]
            atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in known))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; none if it does not exist yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _check_readable(checkpoint: Path) -> None:
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"the checkpoint '{checkpoint}' is corrupted or not a plain checkpoint; delete it, and "
            "`--resume` starts this request again"
        ) from error


def first_process() -> bool:
    """Whether this is the process that writes; the only one unless several train together."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


class SequenceRunner:
    """Runs a method once per request and resumes where it was stopped.

    Finished requests are read back from `folder`; an unfinished one continues from its last epoch
    and reaches the same weights as an unbroken run.

    Args:
        model: the original model; it is not changed when the method takes a copy.
        method: makes the method for a model.
        data: the data module.
        requests: what to forget, in order.
        trainer: makes a Lightning trainer.
        folder: working folder for checkpoints, created if needed.

    Raises:
        RequestError: no request.
        DataError: a detector with data that has no boxes, or a classifier with data that has.
    """

    def __init__(
        self,
        model: Model,
        method: MethodFactory,
        data: ForgetDataModule,
        requests: Sequence[ForgetRequest],
        trainer: TrainerFactory,
        folder: Path,
    ) -> None:
        if not requests:
            raise RequestError("`request` is empty; name what shall be forgotten")
        check_fits(model, data)
        self.model, self.method, self.data = model, method, data
        self.requests, self.trainer, self.folder = list(requests), trainer, folder
        for end in range(1, len(self.requests) + 1):  # refuse a bad one before the first starts
            data.request(*self.requests[:end])

    def run(self) -> SequenceResult:
        """Forget all requests in order."""
        self._check_origin()
        self.data.request(self.requests[0])
        rows = [{"step": 0, "request": ""} | row for row in quality_by_role(self.model, self.data)]
        before = current = self.model
        carried: dict[str, torch.Tensor] = {}
        steps: list[Step] = []
        curve: list[dict[str, Any]] = []
        for number, request in enumerate(self.requests, start=1):
            folder = self.folder / f"request-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            self.data.request(*self.requests[:number])
            done = folder / "done.json"
            before = current
            if done.is_file():
                step = self._read(done, folder)
                current = detached_copy(current)
                load_model(current, folder / "model.safetensors")
                current.eval()
            else:
                current, carried, step = self._forget(current, carried, number, folder)
            carried = load_file(folder / "carry.safetensors")
            steps.append(step)
            rows += step.rows
            curve += read_rows(folder / "curve.jsonl")
            if step.no_op:
                logger.warning("request %d (%s) changed nothing", number, request.name)
        return SequenceResult(current, before, steps, rows, curve)

    def _check_origin(self) -> None:
        """A working folder belongs to one model and one list of requests."""
        origin = {
            "model": state_hash(self.model),
            "requests": [request.hash for request in self.requests],
        }
        path = self.folder / "origin.json"
        if path.is_file() and json.loads(path.read_text()) != origin:
            raise ConfigurationError(
                f"the unfinished run in '{self.folder}' belongs to another model or other "
                "requests; delete it or choose another run name"
            )
        if first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(origin))

    def _forget(
        self, current: Model, carried: dict[str, torch.Tensor], number: int, folder: Path
    ) -> tuple[Model, dict[str, torch.Tensor], Step]:
        request = self.requests[number - 1]
        method = self.method(current)
        method.inherit(carried)
        with measured() as cost:
            self._fit(method, number, folder)
            unlearned = method.finalize()
        rows = [
            {"step": number, "request": request.name} | row
            for row in quality_by_role(unlearned, self.data)
        ]
        step = Step(
            request=request,
            method=type(method).__name__,
            rows=rows,
            cost=cost.to_dict() | method.cost(),
            statistics=method.statistics(),
            access=method.access.to_dict(),
            seed=method.seed,
            no_op=method.no_op,
        )
        carried = method.carry()
        if first_process():
            self._write(unlearned, method, carried, step, folder)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        return unlearned, carried, step

    def _fit(self, method: ForgettingMethod, number: int, folder: Path) -> None:
        method.bind(self.data)  # a forked training process binds its own copy only
        if method.view is None:
            return
        self.data.view = method.view
        point = ResumePoint(folder)
        if point.last_model_path:
            _check_readable(point.path)
        curve = ForgettingCurve(folder / "curve.jsonl", self.data, number)
        trainer = self.trainer(default_root_dir=str(folder), callbacks=[point, curve])
        try:
            trainer.fit(
                method,
                datamodule=self.data,
                ckpt_path=point.last_model_path or None,
                weights_only=True,
            )
        except SystemExit:
            # Lightning turns Ctrl-C into an exit; the caller wants to know that it was one.
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        finally:
            self.data.access = None

    def _write(
        self,
        model: Model,
        method: ForgettingMethod,
        carried: dict[str, torch.Tensor],
        step: Step,
        folder: Path,
    ) -> None:
        save_model(model, str(folder / "model.safetensors"))
        save_file({k: v.contiguous() for k, v in carried.items()}, folder / "carry.safetensors")
        if method.saves_adapter:
            step.adapter = folder / "adapter"
            method.save_adapter(step.adapter)
        record = {
            "method": step.method,
            "rows": step.rows,
            "cost": step.cost,
            "statistics": step.statistics,
            "access": step.access,
            "seed": step.seed,
            "no_op": step.no_op,
            "finished": time.time(),
        }
        atomic_write(folder / "done.json", json.dumps(record))
        (folder / "last.ckpt").unlink(missing_ok=True)

    def _read(self, done: Path, folder: Path) -> Step:
        record = json.loads(done.read_text())
        record.pop("finished")
        number = int(folder.name.split("-")[1])
        adapter = folder / "adapter"
        return Step(
            request=self.requests[number - 1],
            adapter=adapter if adapter.is_dir() else None,
            **record,
        )
