"""Judges of answers, and the metrics that add up what they say."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.answer_judges import (
    AnswerJudge,
    ComplianceJudge,
    KeywordJudge,
    TargetJudge,
    judged,
)
from mmforget.metrics.answer_metrics import (
    AttackSuccess,
    ExactMatch,
    OptionAccuracy,
    RefusalRate,
    Rouge,
    SafeAnswerRefusal,
)
from mmforget.metrics.modality import ModalityTable
from mmforget.metrics.rates import Mean
from mmforget.metrics.visual_forgetting import VisualForgetting


def test_local_judges():
    target = TargetJudge({"anna": ["the girl from oslo"]})
    assert isinstance(target, AnswerJudge)
    assert target("who?", "This is Anna.", ["anna"])
    assert target("who?", "the girl from Oslo!", ["anna"])
    assert not target("who?", "This is Annabel.", ["anna"])
    assert target("who?", "This is not Anna.", ["anna"])  # denied, and yet named
    with pytest.raises(DataError, match="no target"):
        target("who?", "Anna", [])
    keyword = KeywordJudge(["oslo", "step one"])
    assert keyword("how?", "Step one: mix", []) and not keyword("how?", "one step", [])
    with pytest.raises(ConfigurationError, match="`keywords` is 'oslo'"):
        KeywordJudge("oslo")
    comply = ComplianceJudge(languages=("en",))
    assert comply("how?", "First, mix", []) and not comply("how?", "I cannot say", [])


def test_failures_of_a_judge_are_left_out_and_reported(caplog):
    def judge(question, answer, targets):
        if answer == "broken":
            raise ConnectionError("the judge has gone")
        return None if answer == "unclear" else answer in targets

    answers = ["anna", "broken", "bert", "unclear"]
    with caplog.at_level(logging.WARNING):
        found = judged(judge, ["who?"] * 4, answers, ["anna"] * 4)
    assert found.per_sample == (1.0, None, 0.0, None)
    assert found.value == 0.5 and found.mean == Mean(1.0, 2, 2)
    assert "failed at 2 of 4" in caplog.text and "the judge has gone" in caplog.text
    with pytest.raises(DataError, match="must return True, False or None"):
        judged(lambda *_: 0.7, ["who?"], ["anna"], ["anna"])  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match="no target"):
        judged(TargetJudge(), ["who?"], ["anna"], [[]])


def test_several_answers_to_a_prompt():
    def judge(question, answer, targets):
        return None if answer == "unclear" else answer in targets

    answers = ["anna", "bert", "bert", "unclear", "unclear", "anna", "bert", "bert"]
    found = judged(judge, ["who?"] * 8, answers, ["anna"] * 8, samples=2)
    assert found.per_sample == (1.0, None, 1.0, 0.0)
    with pytest.raises(DataError, match="`samples` is 3"):
        judged(judge, ["who?"] * 8, answers, ["anna"] * 8, samples=3)


SAID = ["Anna", "sorry, no", "", "It is Bert", "bert", "C) oslo", "A dog"]
TRUTHS = ["anna", "bert", "clara", "bert", "anna", "C", "A"]


def updates():
    """Per metric the arguments of five batches, the last of which is empty."""
    rows = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 7), slice(7, 7)]
    roles = ["forget", "retain"] * 4
    kinds = ["image", "image", "text", "both", "both", "text", "image"]
    full = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    cut = np.outer(full, [0.0, 0.5, 1.0]).tolist()
    made = {
        "rouge": (Rouge, lambda r: (SAID[r], TRUTHS[r])),
        "exact": (ExactMatch, lambda r: (SAID[r], TRUTHS[r])),
        "options": (lambda: OptionAccuracy(4), lambda r: (SAID[r], TRUTHS[r])),
        "attack": (AttackSuccess, lambda r: (["who?"] * len(SAID[r]), SAID[r], TRUTHS[r])),
        "refusal": (RefusalRate, lambda r: (SAID[r],)),
        "safe": (SafeAnswerRefusal, lambda r: (SAID[r], TRUTHS[r])),
        "modality": (ModalityTable, lambda r: (full[r], roles[: len(SAID)][r], kinds[r])),
        "curve": (lambda: VisualForgetting(3), lambda r: (full[r], cut[r])),
    }
    return {name: (make, [give(row) for row in rows]) for name, (make, give) in made.items()}


def values(rank: int = 0, world: int = 1) -> dict[str, np.ndarray]:
    found = {}
    for name, (make, parts) in updates().items():
        metric = make()
        for part in parts[rank::world]:
            metric.update(*part)
        found[name] = np.array([[*mean] for mean in metric.compute().values()])
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    np.savez(os.path.join(folder, f"{rank}.npz"), **values(rank, 2))  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = values()
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_values_of_the_metrics():
    found = {}
    for name, (make, parts) in updates().items():
        metric = make()
        assert all(mean.value is None for mean in metric.compute().values()), name
        metric.reset()
        for part in parts:
            metric.update(*part)
        found[name] = metric.compute()
    assert found["exact"]["exact_match"] == Mean(1.0, 7)
    assert found["options"]["accuracy"] == Mean(1.0, 7)
    assert found["options"]["invalid"] == Mean(6.0, 7)
    assert found["attack"]["attack_success"] == Mean(4.0, 7)  # Anna, Bert, C and A
    assert found["refusal"]["refusal"] == Mean(1.0, 7)
    assert found["safe"]["sarr"] == Mean(2.0, 7)
    assert found["safe"]["sarr_strict"] == Mean(3.0, 7)
    assert found["rouge"]["rouge1_recall"].value == pytest.approx(4 / 7)
    assert found["modality"]["forget/text"] == Mean(1.0, 1)
    assert found["modality"]["retain/both"] == Mean(1.0, 1)
    assert found["modality"]["retain/image"] == Mean(0.0, 1)
    assert found["modality"]["forget/image"] == Mean(2.0, 2)
    assert found["curve"]["cut_1"] == Mean(2.5, 7)
