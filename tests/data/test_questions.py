from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import ImageDataset, View
from mmforget.data.digit_world import DigitWorld
from mmforget.data.question_records import (
    OTHER,
    QuestionDataset,
    Records,
    normalised,
    overlap_of,
)
from mmforget.data.questions import QuestionDataModule, RetainQuestions
from mmforget.data.split import STAGES, Stage
from mmforget.errors import AccessError, ConfigurationError, DataError, RequestError
from mmforget.methods.base import joined
from mmforget.request import ForgetRequest

CLASSES = ("ann", "bob", "cleo", OTHER)
Row = tuple[tuple[int, ...], str, str, str, int, int]


class Faces(QuestionDataset):
    """Pictures of one colour, of a size that depends on the key; counts how often each is read."""

    def __init__(self, ids: np.ndarray, labels: np.ndarray, records: Records) -> None:
        super().__init__("faces", ids, labels, CLASSES, records)
        self.reads: Counter[int] = Counter()

    def read_keys(self, keys: Sequence[int]) -> list[Tensor]:
        self.reads.update(keys)
        return [torch.full((3, 8 + key % 3, 8), key % 100, dtype=torch.uint8) for key in keys]


def faces(first: int, extra: Sequence[Row] = ()) -> Faces:
    """Nine pictures of three persons, each with three questions; three text-only questions."""
    rows: list[Row] = []
    for number in range(9):
        person, key = number % 3, first + number
        wording = ("Who is this?", "Name?")[number // 3 % 2]
        rows.append(((key,), wording, CLASSES[person], "name", person, person))
        yes = number < 3
        rows.append(
            (
                (key,),
                "Is this bob?",
                "yes" if person == 1 else "no",
                "both",
                person if person == 1 else 3,
                person,
            )
        )
        rows.append(((key,), "Is it day?", "yes" if yes else "no", "harmless", 3, person))
    for person, city in enumerate(("Oslo", "Rome", "Paris")):
        rows.append(((), f"Where does {CLASSES[person]} live?", city, "text", person, person))
    rows += extra
    pictures, question, answer, kind, label, subject = zip(*rows, strict=True)
    wording = ["held_out" if text == "Name?" else "train" for text in question]
    ids = 100 * first + np.arange(len(rows))
    return Faces(
        ids,
        np.array(label),
        Records(pictures, question, answer, kind, wording, np.array(subject)),
    )


class FaceData(QuestionDataModule):
    def __init__(
        self,
        view: View = "full",
        forget_questions: Sequence[str] = ("name", "both"),
        forget_text: bool = False,
        retain_questions: RetainQuestions = "all",
        decouple_size: int | None = None,
        extra: Sequence[Row] = (),
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            4,
            seed,
            view=view,
            augment=augment,
            forget_questions=forget_questions,
            forget_text=forget_text,
            retain_questions=retain_questions,
            decouple_size=decouple_size,
        )
        self.extra = extra

    def build(self) -> dict[Stage, ImageDataset]:
        starts = dict(zip(STAGES, (100, 200, 300), strict=True))
        return {s: faces(n, self.extra if s == "train" else ()) for s, n in starts.items()}


BOB = ForgetRequest(classes=("bob",))


# ---- records ------------------------------------------------------------------------------------


def test_a_batch_has_lists_of_pictures_and_texts() -> None:
    two_pictures = ((101, 102), "Which one is Ann?", "none", "compare", 3, 3)
    data = FaceData(extra=[two_pictures]).questions("train")
    batch = data[[0, 27, 30, ~4]]
    assert [[tuple(one.shape) for one in group] for group in batch["images"]] == [
        [(3, 9, 8)],
        [],
        [(3, 10, 8), (3, 8, 8)],
        [(3, 10, 8)],
    ]
    assert batch["images"][0][0].dtype == torch.uint8
    assert batch["question"] == [
        "Who is this?", "Where does ann live?", "Which one is Ann?", "Is this bob?"
    ]  # fmt: skip
    assert batch["answer"] == ["ann", "Oslo", "none", "yes"]
    assert batch["question_kind"] == ["name", "text", "compare", "both"]
    assert batch["label"].tolist() == [0, 0, 3, 1]
    assert batch["weight"].tolist() == [1, 1, 1, 0]
    assert batch["id"].tolist() == [10000, 10027, 10030, 10004]
    one = data[~4]
    assert one["answer"] == "yes" and one["weight"].item() == 0 and len(one["images"]) == 1


def test_pictures_are_read_once_for_all_their_records() -> None:
    data = faces(100)
    data.pictures([0, 1, 2, 3])
    data.subset(np.array([1, 4])).pictures([0, 1])
    assert set(data.reads.values()) == {1}
    assert set(data.reads) == {100, 101}


def test_pictures_above_the_limit_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmforget.data.base.CACHE_LIMIT_BYTES", 100)
    data = faces(100)
    for _ in range(2):
        data.pictures([0])
    assert data.reads[100] == 2


def test_an_unlabelled_view_tells_no_answers() -> None:
    view = faces(100).unlabelled()
    assert {"label", "answer"} & view[[0]].keys() == set()
    assert view[[0]]["question"] == ["Who is this?"]
    with pytest.raises(AccessError, match="without answers"):
        view.answers  # noqa: B018


def test_hash_depends_on_questions_answers_and_pictures() -> None:
    def with_(column: str, value: str | tuple[int, ...]) -> str:
        row = {"pictures": (100,), "question": "q", "answer": "a", "kind": "k", "wording": "train"}
        columns = {name: [entry] for name, entry in (row | {column: value}).items()}
        records = Records(**columns, subject=np.array([0]))  # type: ignore[arg-type]
        return Faces(np.array([1]), np.array([0]), records).hash

    columns = ("question", "answer", "kind", "wording")
    found = [with_("answer", "a"), *(with_(name, "z") for name in columns)]
    found.append(with_("pictures", (101,)))
    assert len(set(found)) == 6
    data = faces(100)
    assert data.hash == faces(100).hash == data.augmented(3).hash
    assert len({data.hash, data.unlabelled().hash, data.subset(np.arange(5)).hash}) == 3


def test_bad_records_are_refused() -> None:
    def made(classes: Sequence[str] = CLASSES, **columns: object) -> QuestionDataset:
        row = {
            "pictures": [(1,)],
            "question": ["q"],
            "answer": ["a"],
            "kind": ["k"],
            "wording": ["train"],
            "subject": np.array([0]),
        }
        records = Records(**(row | columns))  # type: ignore[arg-type]
        return QuestionDataset("given", np.array([7]), np.array([0]), classes, records)

    made()
    with pytest.raises(DataError, match="an empty answer at id 7"):
        made(answer=[" "])
    with pytest.raises(DataError, match="an empty question at id 7"):
        made(question=[""])
    with pytest.raises(DataError, match="1 ids, but 2 entries of `kind`"):
        made(kind=["k", "k"])
    with pytest.raises(DataError, match="needs 'other' as its last class"):
        made(classes=("a", "b"))


def test_one_tensor_only_of_records_with_one_picture_of_one_size() -> None:
    data = faces(100)
    assert data.pixels(np.array([0, 1])).shape == (2, 3, 9, 8)
    with pytest.raises(DataError, match="use `pictures`"):
        data.pixels(np.array([0, 3]))
    with pytest.raises(DataError, match="use `pictures`"):
        data.pixels(np.array([27]))


def test_augmented_pictures_depend_on_sample_and_epoch_only() -> None:
    class Noise(Faces):
        def read_keys(self, keys: Sequence[int]) -> list[Tensor]:
            return [
                torch.randint(256, (3, 16, 16), dtype=torch.uint8,
                              generator=torch.Generator().manual_seed(key))
                for key in keys
            ]  # fmt: skip

    plain = faces(100)
    data = Noise(plain.ids, plain.labels, plain.records)
    moved = data.augmented(5)
    one, many = moved[[3]]["images"][0][0], moved[[0, 3]]["images"]
    assert torch.equal(one, many[1][0])
    assert one.dtype == torch.uint8 and one.shape == (3, 16, 16)
    found = [torch.equal(a[0], b[0]) for a, b in zip(
        data[list(range(27))]["images"], moved[list(range(27))]["images"], strict=True
    )]  # fmt: skip
    assert not all(found)


# ---- roles --------------------------------------------------------------------------------------


def kinds_of(data: QuestionDataset) -> Counter[str]:
    return Counter(data.kinds)


def test_the_forget_set_holds_what_reveals_the_entity() -> None:
    data = FaceData()
    data.request(BOB)
    forget, retain = data.subset("train", "forget"), data.subset("train", "retain")
    assert kinds_of(forget) == {"name": 3, "both": 3}
    assert set(forget.answers) == {"bob", "yes"}
    # harmless questions about the same pictures and text-only facts stay
    assert kinds_of(retain) == {"name": 6, "both": 6, "harmless": 9, "text": 3}
    assert len(forget) + len(retain) == len(data.questions("train"))


def test_options_say_which_questions_are_forgotten_and_retained() -> None:
    data = FaceData(forget_questions=["name"], forget_text=True, retain_questions="harmless")
    split = data.request(BOB)
    assert kinds_of(data.subset("train", "forget")) == {"name": 3, "text": 1}
    assert kinds_of(data.subset("train", "retain")) == {"both": 9, "harmless": 9}
    assert kinds_of(data.subset("test", "retain")) == {
        "name": 6, "both": 9, "harmless": 9, "text": 2
    }  # fmt: skip
    assert len(split.ids["train/retain"]) == 18
    assert kinds_of(data.subset("train", "retain", whole=True))["name"] == 6
    whole = data.unlimited()
    assert kinds_of(whole.subset("train", "retain"))["name"] == 6
    assert kinds_of(data.subset("train", "retain")) == {"both": 9, "harmless": 9}


def test_earlier_requests_and_single_records() -> None:
    data = FaceData()
    data.request(BOB, ForgetRequest(classes=("cleo",)))
    assert set(data.subset("train", "previous").answers) == {"bob", "yes"}
    assert set(data.subset("train", "forget").answers) == {"cleo"}
    assert len(data.probe("test", "name", "previous")) == 3
    data.request(ForgetRequest(samples=(10000, 10027)))
    assert data.subset("train", "forget").ids.tolist() == [10000, 10027]
    assert data.probe("train", "name", "forget").ids.tolist() == [10000]
    assert len(data.probe("train", "name", "retain")) == 8


def test_what_cannot_be_requested() -> None:
    with pytest.raises(RequestError, match="reveal no entity"):
        FaceData().request(ForgetRequest(classes=("other",)))
    with pytest.raises(RequestError, match="did you mean 'bob'"):
        FaceData().request(ForgetRequest(classes=("bobb",)))
    with pytest.raises(ConfigurationError, match="kind 'names', did you mean 'name'"):
        FaceData(forget_questions=["names"]).request(BOB)
    with pytest.raises(ConfigurationError, match="must be a list"):
        FaceData(forget_questions="name")
    with pytest.raises(ConfigurationError, match="`retain_questions` is 'some'"):
        FaceData(retain_questions="some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="`decouple_size` is 0"):
        FaceData(decouple_size=0)
    every = ("name", "both", "harmless")
    with pytest.raises(DataError, match="set it to 'all'"):
        FaceData(forget_questions=every, retain_questions="harmless").request(BOB)


def test_a_method_reads_what_it_declares() -> None:
    data = FaceData()
    data.request(BOB)
    blind = data.restricted(DataAccess(forget_labels=False, retain="none"))
    assert "answer" not in blind.subset("train", "forget")[[0]]
    with pytest.raises(AccessError, match="retain='none'"):
        blind._decoupled()
    with pytest.raises(AccessError, match="may not probe"):
        blind.probe("train", "name")
    half = data.restricted(DataAccess(retain="fraction", retain_labels=False))
    assert "answer" not in half._decoupled()[[0]]


# ---- probes -------------------------------------------------------------------------------------


def test_probes_go_by_the_entity_that_is_shown() -> None:
    data = FaceData()
    data.request(BOB)
    assert set(data.probe("test", "harmless", "forget").subjects) == {1}
    assert len(data.probe("test", "harmless", "forget")) == 3
    assert data.probe("test", "text", "forget").answers == ["Rome"]
    assert data.probe("test", "name", "forget", wording="held_out").questions == ["Name?"]
    assert len(data.probe("val", "name")) == 9
    # pictures of all other persons, and "no" for an answer
    assert set(data.probe("test", "both", "retain").answers) == {"no"}


def test_probes_that_do_not_exist() -> None:
    data = FaceData()
    with pytest.raises(ConfigurationError, match="needs a request"):
        data.probe("test", "name", "forget")
    with pytest.raises(ConfigurationError, match="`kind` is 'nam', did you mean 'name'"):
        data.probe("test", "nam")
    with pytest.raises(ConfigurationError, match="`wording` is 'french'"):
        data.probe("test", "name", wording="french")
    with pytest.raises(ConfigurationError, match="no role 'forgotten'"):
        data.probe("test", "name", "forgotten")  # type: ignore[arg-type]


# ---- Prompt Decouple ----------------------------------------------------------------------------


def test_safe_pictures_with_the_questions_of_the_forget_set() -> None:
    data = FaceData(view="decoupled", retain_questions="harmless")
    data.request(BOB)
    found = data._decoupled()
    forget = data.subset("train", "forget")
    assert Counter(map(normalised, found.questions)) == Counter(map(normalised, forget.questions))
    assert 1 not in found.subjects
    for question, answer, subject in zip(
        found.questions, found.answers, found.subjects, strict=True
    ):
        assert answer == ("no" if question == "Is this bob?" else CLASSES[subject])
    assert found.ids.tolist() == data._decoupled().ids.tolist()
    seeds = [FaceData(seed=seed) for seed in range(4)]
    for other in seeds:
        other.request(BOB)
    assert len({tuple(other._decoupled().ids) for other in seeds}) > 1


def test_as_many_decoupled_records_as_are_asked_for() -> None:
    for size in (2, 50):
        data = FaceData(decouple_size=size)
        data.request(BOB)
        found = Counter(data._decoupled().ids.tolist())
        assert found.total() == size
    # each is used once before any comes again
    questions = {
        id_: q for id_, q in zip(data._decoupled().ids, data._decoupled().questions, strict=True)
    }
    for text in set(questions.values()):
        counts = [found[id_] for id_ in questions if questions[id_] == text]
        assert max(counts) - min(counts) <= 1


def test_no_counterpart_for_what_is_never_asked_of_others() -> None:
    extra = [((101,), "What is bob's hobby?", "chess", "hobby", 1, 1)]
    data = FaceData(forget_questions=["hobby"], extra=extra)
    data.request(BOB)
    with pytest.raises(DataError, match="use the view 'paired'"):
        data._decoupled()
    data = FaceData(forget_questions=["hobby", "name"], extra=extra)
    data.request(BOB)
    assert len(data._decoupled()) == 4  # as many as there are to forget


def test_data_without_questions_cannot_be_decoupled() -> None:
    data = DigitWorld(strokes=20, view="decoupled")
    data.request(ForgetRequest(classes=("three",)))
    with pytest.raises(ConfigurationError, match="DigitWorld has none; use 'paired'"):
        data.train_dataloader()


# ---- loaders ------------------------------------------------------------------------------------


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[dict[str, list[int]]] = []
        self.roles: Counter[int] = Counter()

    def training_step(self, batch: dict[str, dict[str, object]], batch_idx: int) -> Tensor:
        parts = batch if "forget" in batch and isinstance(batch["forget"], dict) else {"all": batch}
        self.seen.append({name: part["id"].tolist() for name, part in parts.items()})  # type: ignore[attr-defined]
        return self.weight.sum()

    def validation_step(
        self, batch: dict[str, object], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.roles[dataloader_idx] += len(batch["question"])  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_trains_and_validates_on_all_streams() -> None:
    data = FaceData(view="decoupled", decouple_size=3)
    data.request(BOB)
    module = Recorder()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(module.seen) == 6  # 24 retained records, 4 at a time
    assert all(set(step) == {"forget", "retain", "decouple"} for step in module.seen)
    assert module.roles == {0: 6, 1: 24}
    assert data.eval_names("val") == ("forget", "retain")


def test_batches_are_the_same_for_one_and_two_processes() -> None:
    from mmforget.data.base import GlobalBatchSampler

    data = FaceData()
    data.request(BOB)
    part = data.subset("train", "forget")
    both = [list(GlobalBatchSampler(part, 5, True, 0, "t", rank=r, world=2)) for r in (0, 1)]
    one = list(GlobalBatchSampler(part, 5, True, 0, "t", rank=0, world=1))
    for first, second, whole in zip(*both, one, strict=True):
        mixed = [place for pair in zip(first, second, strict=True) for place in pair]
        assert mixed[: len(whole)] == list(whole)
        batch = part[mixed]
        assert batch["weight"].tolist() == [1.0] * len(whole) + [0.0] * (len(mixed) - len(whole))
        assert len(batch["question"]) == len(batch["images"]) == len(mixed)


def test_the_view_statistics_shows_every_record_once() -> None:
    data = FaceData(view="statistics")
    data.request(BOB)
    batches = list(data.train_dataloader())
    ids = [int(i) for batch in batches for i in batch["id"]]
    assert ids == sorted(data.questions("train").ids.tolist())
    assert sum(int(batch["forget"].sum()) for batch in batches) == 6


def test_batches_of_two_streams_can_be_joined() -> None:
    data = FaceData(view="paired")
    data.request(BOB)
    pair = next(iter(data.train_dataloader()))[0]
    both, rows = joined(pair)
    assert rows == 4
    assert len(both["images"]) == len(both["question"]) == len(both["answer"]) == 8
    assert both["question"][:4] == pair["forget"]["question"]


# ---- overlap ------------------------------------------------------------------------------------


def test_a_question_that_is_forgotten_and_retained_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # the same picture and question, once labelled with nobody; and a copy of the picture 101
    extra = [
        ((101,), "who is THIS", "nobody", "harmless", 3, 1),
        ((1301,), "Is it day?", "no", "harmless", 3, 3),
    ]
    data = FaceData(extra=extra)
    with caplog.at_level(logging.WARNING):
        data.request(BOB)
        data.request(BOB)
    assert [r.message.partition(" have")[0].partition(" are")[0] for r in caplog.records] == [
        "1 records of the forget set", "1 pictures of the forget set"
    ]  # fmt: skip
    found = data.overlap()
    assert (found.pairs, found.copies) == (1, 1)


def test_disjoint_sets_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    data = FaceData()
    with caplog.at_level(logging.WARNING):
        data.request(BOB)
    assert not caplog.records
    assert overlap_of(faces(100), faces(200)).pairs == 3  # the questions without picture


def test_normalised_texts() -> None:
    assert normalised("  Who  is\tTHIS ?") == normalised("who is this") == "who is this"
    assert normalised("?!") == ""
