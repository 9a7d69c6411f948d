"""What a multimodal language model says: with a real network, in batches, in two processes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from mmforget import DigitQuestions, MultimodalLM
from mmforget.audit.multimodal_answers import Said, listen, spoken
from mmforget.data.questions import QuestionDataset
from mmforget.testing.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    network, processor = tiny_multimodal("llava", words=DigitQuestions.words)
    return MultimodalLM(network, processor, max_new_tokens=3).train()


@pytest.fixture(scope="module")
def records() -> QuestionDataset:
    """Pictures, scenes and questions without picture; an odd number of them."""
    data = DigitQuestions(strokes=10, scenes=1, eval_scenes=1, variants=1, text_copies=1)
    test = data.questions("test")
    return test.subset(np.r_[0:6, 30:33, 40:45])


def same(one: Said, other: Said) -> None:
    assert one.id.tolist() == other.id.tolist() and one.answers == other.answers
    assert torch.allclose(one.total, other.total, atol=1e-4)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert np.array_equal(np.asarray(one.read), np.asarray(other.read))


def test_batches_do_not_matter(model: MultimodalLM, records: QuestionDataset) -> None:
    head = model.head.weight.detach()
    whole = listen(model, records, 64, head=head)
    same(whole, listen(model, records, 3, head=head))
    assert whole.answers == spoken(model, records, 5)
    assert whole.id.tolist() == records.ids.tolist()
    assert model.training, "the mode was not given back"


def test_losses_are_those_of_the_model(model: MultimodalLM, records: QuestionDataset) -> None:
    batch = records[list(range(len(records)))]
    with torch.no_grad():
        known = copy.deepcopy(model).eval().token_losses(batch)
    said = listen(model, records, answers=False)
    assert said.answers == [] and said.read is None
    assert torch.allclose(said.total, known.total.double(), atol=1e-5)
    assert said.tokens.tolist() == known.tokens.tolist()
    spoken_only = listen(model, records, losses=False)
    assert len(spoken_only.total) == 0 and len(spoken_only.answers) == len(records)
    other = listen(model, records, answers=False, instead=["anna"] * len(records))
    assert set(other.tokens.tolist()) == {2}  # the name and the end of the turn
    assert not torch.allclose(other.total, said.total)


def test_a_head_reads_what_it_scores_highest(model: MultimodalLM, records: QuestionDataset) -> None:
    """A head whose rows are the states themselves reads these answers, and an empty one none."""
    batch = records[[0]]
    with torch.no_grad():
        found = copy.deepcopy(model).eval().answer_logits(batch)
    head = torch.zeros_like(model.head.weight)
    for place, token in enumerate(found.labels[0].tolist()):
        head[token] = found.hidden[0, place] / found.hidden[0, place].square().sum()
    one = records.subset(np.array([0]))
    assert np.asarray(listen(model, one, answers=False, head=head).read).tolist() == [True]
    none = torch.zeros_like(head)
    assert np.asarray(listen(model, one, answers=False, head=none).read).tolist() == [False]


def _worker(rank: int, folder: str, model: MultimodalLM, records: QuestionDataset) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    said = listen(model, records, 4, head=model.head.weight.detach())
    torch.save((said.id, said.answers, said.total, said.tokens, said.read), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_what_one_has(
    model: MultimodalLM, records: QuestionDataset, tmp_path: Path
) -> None:
    alone = listen(model, records, 4, head=model.head.weight.detach())
    mp.start_processes(_worker, args=(str(tmp_path), model, records), nprocs=2, start_method="fork")
    for rank in range(2):
        same(alone, Said(*torch.load(tmp_path / f"{rank}.pt", weights_only=False)))
