"""The frame of the methods on answers: terms, streams, trained parts, adapters, references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmforget.artifacts.adapters import apply_adapter
from mmforget.data import DigitWorld
from mmforget.errors import CapabilityError, ConfigurationError, DataError, WeightsError
from mmforget.methods import (
    DPO,
    NPO,
    GradDiff,
    GradientAscent,
    KLMinimization,
    PreferenceOptimization,
    RandomLabels,
    SalUn,
    SimNPO,
)
from mmforget.methods.answer_unlearning import AnswerUnlearning
from mmforget.methods.preference_optimization import refused
from mmforget.models.base import Answers, state_hash
from mmforget.models.multimodal import MultimodalLM
from mmforget.request import ForgetRequest
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.named_patterns import REFUSAL, WORDS, NamedPatterns, named_patterns
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal

KINDS = get_args(TinyMultimodalKind)


@pytest.fixture(scope="module")
def kinds() -> dict[str, MultimodalLM]:
    return {kind: MultimodalLM(*tiny_multimodal(kind, WORDS)).eval() for kind in KINDS}


@pytest.fixture(scope="module")
def shared(kinds: dict[str, MultimodalLM]) -> MultimodalLM:
    return kinds["llava"]


@pytest.fixture(scope="module")
def data() -> NamedPatterns:
    return named_patterns()


@pytest.fixture
def streams(data: NamedPatterns) -> dict[str, Any]:
    """One batch of every stream."""
    return {
        "forget": data.subset("train", "forget")[[0, 1, 2]],
        "retain": data.subset("train", "retain")[[0, 1, -1 + len(data.subset("train", "retain"))]],
        "decouple": data._decoupled()[[0, 1]],
    }


def ce(model: Any, batch: Any, answers: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the tokens of a batch, and their number, from a pass of its own."""
    found = model.token_losses(batch if answers is None else {**batch, "answer": answers})
    return found.total.sum().detach(), found.tokens.sum()


def mean_ce(model: Any, batch: Any) -> float:
    total, tokens = ce(model, batch)
    return float(total / tokens)


def fitted(method: AnswerUnlearning, epochs: int = 1, **settings: Any) -> AnswerUnlearning:
    data = named_patterns(**settings)
    data.view = method.view
    quiet_trainer(max_epochs=epochs).fit(method, datamodule=data)
    return method


# ---- terms --------------------------------------------------------------------------------------


def test_the_model_offers_answers(shared):
    assert isinstance(shared, Answers)
    assert not isinstance(torch.nn.Linear(2, 2), Answers)


@pytest.mark.parametrize(
    ("make", "forget", "retain", "decouple"),
    [
        (lambda m: GradientAscent(m), -1.0, None, None),
        (lambda m: GradientAscent(m, decouple_weight="auto"), -1.0, None, 0.5),
        (lambda m: GradDiff(m), -1.0, 1.0, None),
        (lambda m: GradDiff(m, decouple_weight="auto"), -1.0, 0.5, 0.5),
        (lambda m: GradDiff(m, decouple_weight=0.0), -1.0, 1.0, None),
        (lambda m: GradDiff(m, forget_weight=2.0, retain_weight=0.3, decouple_weight=0.2),
         -2.0, 0.3, 0.2),
        (lambda m: KLMinimization(m), -1.0, 0.0, None),
        (lambda m: KLMinimization(m, decouple_weight="auto"), -1.0, 0.0, 1.0),
    ],
)  # fmt: skip
def test_terms_are_those_of_the_published_table(shared, streams, make, forget, retain, decouple):
    """Every term equals its weight times the loss of a forward pass of its own stream."""
    method = make(shared)
    wanted = {"forget": forget, "retain": retain, "decouple": decouple}
    batch = streams["forget"] if method.view == "forget" else streams
    terms = method.losses(batch)
    assert set(terms) == {name for name, weight in wanted.items() if weight is not None}
    for name, term in terms.items():
        assert term.item() == pytest.approx(
            wanted[name] * mean_ce(shared, streams[name]), abs=1e-5
        ), name
    assert method.view == {
        (False, False): "forget",
        (True, False): "paired",
    }.get((retain is not None, bool(decouple)), "decoupled")


def test_preference_optimisation_is_one_mean_over_refusals_and_retained_answers(shared, streams):
    method = PreferenceOptimization(shared, refusals=[REFUSAL], decouple_weight="auto")
    unlabelled = {k: v for k, v in streams["forget"].items() if k not in ("answer", "label")}
    terms = method.losses(streams | {"forget": unlabelled})
    refused_, n_refused = ce(shared, streams["forget"], [REFUSAL] * 3)
    kept, n_kept = ce(shared, streams["retain"])
    tokens = n_refused + n_kept
    torch.testing.assert_close(terms["forget"], refused_ / tokens)
    torch.testing.assert_close(terms["retain"], kept / tokens)
    assert terms["decouple"].item() == pytest.approx(mean_ce(shared, streams["decouple"]), abs=1e-5)
    assert not method.access.forget_labels


@pytest.mark.parametrize("norm", ["token", "sequence", "batch_token"])
def test_means_over_answers_of_different_lengths(shared, streams, norm):
    batch = {**streams["retain"], "answer": ["red", "paris rome oslo", "blue green"]}
    batch["weight"] = torch.tensor([1.0, 1.0, 0.0])  # the last one is padding
    losses = shared.token_losses(batch)
    total, tokens = losses.total[:2], losses.tokens[:2]
    expected = {
        "token": (total / tokens).mean(),
        "sequence": total.mean(),
        "batch_token": total.sum() / tokens.sum(),
    }[norm]
    method = GradientAscent(shared, seq_norm=norm)
    torch.testing.assert_close(method.losses(batch)["forget"], -expected)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_accumulated_batches_are_one_large_batch(shared, norm):
    def run(size: int, accumulate: int) -> str:
        method = GradientAscent(shared, lr=0.1, optimizer="sgd", seq_norm=norm)
        data = named_patterns(batch_size=size, view="forget")
        trainer = quiet_trainer(
            max_epochs=1, accumulate_grad_batches=accumulate, precision="64-true"
        )
        trainer.fit(method, datamodule=data)
        assert trainer.global_step == 1
        return method.finalize()

    pairs = zip(run(6, 1).parameters(), run(3, 2).parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_npo_starts_at_its_constant_and_uses_sums(shared, streams):
    method = NPO(shared, beta=0.2, retain="none")
    assert method.losses(streams["forget"])["forget"].item() == pytest.approx(2 * math.log(2) / 0.2)
    with torch.no_grad():
        method.model.head.weight.mul_(1.5)
    nll = method.model.token_losses(streams["forget"]).total
    old = shared.token_losses(streams["forget"]).total
    expected = (2 / 0.2 * (1 + (0.2 * (old - nll)).exp()).log()).mean()
    torch.testing.assert_close(method.losses(streams["forget"])["forget"], expected)


def test_sim_npo_uses_the_loss_per_token(shared, streams):
    method = SimNPO(shared, beta=0.5, delta=1.0, forget_weight=0.25, retain="none")
    each = shared.loss(streams["forget"])
    expected = 0.25 * (2 / 0.5 * (1 + (-0.5 * (each - 1)).exp()).log()).mean()
    torch.testing.assert_close(method.losses(streams["forget"])["forget"], expected)


def test_dpo_compares_refusals_with_answers(shared, streams):
    method = DPO(shared, beta=0.1, refusals=[REFUSAL], retain="none")
    with torch.no_grad():
        method.model.head.weight.mul_(1.2)
    batch = streams["forget"]
    refusal = {**batch, "answer": [REFUSAL] * 3}
    ratio = [
        shared.token_losses(one).total - method.model.token_losses(one).total
        for one in (refusal, batch)
    ]
    expected = (20 * (1 + (-0.1 * (ratio[0] - ratio[1])).exp()).log()).mean()
    torch.testing.assert_close(method.losses(batch)["forget"], expected)


def test_the_retained_divergence_has_a_gradient_and_counts_answers_only(shared, streams):
    method = KLMinimization(shared)
    assert method.losses(streams)["retain"].item() == 0.0
    with torch.no_grad():
        method.model.head.weight.mul_(1.5)
    batch = streams["retain"]
    mine, theirs = (m.answer_logits(batch) for m in (method.model, shared))
    labelled = mine.labels != -100
    p = theirs.logits.softmax(-1)
    each = (p * (p.log() - mine.logits.log_softmax(-1))).sum(-1)
    expected = (each * labelled).sum() / labelled.sum()
    torch.testing.assert_close(method.losses(streams)["retain"], expected, rtol=1e-4, atol=1e-6)


def test_refusals_are_drawn_by_sample_and_step(streams):
    texts = [f"text {n}" for n in range(50)]
    batch = {k: v for k, v in streams["forget"].items() if k != "answer"}
    one = refused(batch, texts, seed=0, step=3)["answer"]
    assert refused(batch, texts, seed=0, step=3)["answer"] == one
    assert refused(batch, texts, seed=0, step=4)["answer"] != one
    assert refused(batch, texts, seed=1, step=3)["answer"] != one
    last = {**batch, "id": batch["id"][2:], "images": batch["images"][2:]}
    assert refused(last, texts, seed=0, step=3)["answer"] == one[2:]
    assert "answer" not in batch


# ---- cost -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "forget", "retain"),
    [
        (lambda m: GradientAscent(m, decouple_weight="auto"), [0, 3], [0, 2]),
        (lambda m: GradDiff(m, decouple_weight="auto"), [0, 3], [0, 5]),
        (lambda m: KLMinimization(m), [0, 3], [3, 3]),
        (lambda m: NPO(m, retain="kl", decouple_weight=1.0), [3, 3], [3, 5]),
        (lambda m: DPO(m, refusals=[REFUSAL]), [6, 6], [0, 3]),
    ],
)
def test_cost_counts_all_streams_and_the_original(shared, streams, make, forget, retain):
    method = make(shared)
    method.count(streams)
    assert method.sample_passes.tolist() == [forget, retain]


# ---- data -----------------------------------------------------------------------------------


def test_prompt_decouple_needs_questions(shared):
    method = GradDiff(shared, decouple_weight=1.0)
    other = DigitWorld(strokes=20, view="paired")
    with pytest.raises(ConfigurationError, match=r"`decouple_weight` is 1, .* DigitWorld has none"):
        method.bind(other)
    with pytest.raises(ConfigurationError, match=r"GradDiff unlearns answers .*DigitQuestions"):
        GradDiff(shared).bind(other)


def test_prompt_decouple_without_counterparts_is_an_error(shared):
    data = NamedPatterns(forget_questions=("text",), view="decoupled")
    data.request(ForgetRequest(classes=("bert",)))
    method = GradDiff(shared, decouple_weight=1.0)
    with pytest.raises(DataError, match="decoupled"):
        quiet_trainer(max_epochs=1).fit(method, datamodule=data)


def test_access_follows_from_the_terms(shared):
    assert GradientAscent(shared).access.retain == "none"
    assert GradientAscent(shared, decouple_weight=1.0).access.retain == "fraction"
    assert NPO(shared, retain="none").view == "forget"
    assert SimNPO(shared, retain_weight=0).view == "forget"


def test_kept_losses_of_the_original_equal_a_second_pass(shared):
    cached, copied = (
        fitted(NPO(shared, lr=1e-3, reference=reference), 2).finalize()
        for reference in ("cache", "copy")
    )
    for one, other in zip(cached.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"`reference` is 'cache', but `augment`"):
        fitted(NPO(shared, reference="cache"), augment=True)


def test_methods_that_need_class_scores_refuse_the_model(shared):
    for method in (RandomLabels, SalUn):
        with pytest.raises(CapabilityError, match=r"needs HasLogits, which MultimodalLM"):
            method(shared)


# ---- what is trained --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_never_reach_the_tower(kinds, kind):
    model = kinds[kind]
    method = GradDiff(model, rank=2, trained=["language", "projector"])
    part = model.family.part
    adapted = {site.name for site in method.adapters.sites}
    assert {part(name) for name in adapted} == {"language"}
    assert len(adapted) == 3 * 7  # layers, and seven projections in each
    table = method.statistics()["trainable"]
    assert table["vision"] == table["head"] == table["other"] == 0
    trained = {n for n, p in method.model.network.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or part(n) == "projector" for n in trained)
    assert sum(table.values()) == sum(
        p.numel() for p in method.model.parameters() if p.requires_grad
    )
    assert table["projector"] > 0
    assert not method.saves_adapter  # the projector would be missing


@pytest.mark.parametrize("kind", KINDS)
def test_trained_parts_by_name_on_every_family(kinds, kind):
    model = kinds[kind]
    before = state_hash(model)
    for part in ("vision", "projector", "language"):
        method = GradientAscent(model, trained=[part])
        for name, parameter in method.model.network.named_parameters():
            assert parameter.requires_grad == (model.family.part(name) == part)
    assert state_hash(model) == before


def test_an_adapter_is_merged_and_saved(shared, tmp_path: Path):
    method = fitted(GradDiff(shared, lr=1e-2, rank=2))
    assert method.saves_adapter
    unlearned = method.finalize()
    method.save_adapter(tmp_path)
    again = MultimodalLM(*tiny_multimodal("llava", WORDS)).eval()
    apply_adapter(again, tmp_path)
    for one, other in zip(unlearned.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert state_hash(unlearned) != state_hash(shared)
    with pytest.raises(ConfigurationError, match="has no adapter"):
        GradDiff(shared).save_adapter(tmp_path)


def test_an_adapter_is_taken_off_a_model_that_was_given_without_copy():
    model = MultimodalLM(*tiny_multimodal("llava", WORDS)).eval()
    before, flags = state_hash(model), [p.requires_grad for p in model.parameters()]
    method = fitted(GradDiff(model, copy=False, lr=1e-2, rank=2))
    assert method.restore() is model
    assert state_hash(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_checkpoints_hold_no_frozen_weights(shared, tmp_path: Path):
    method = KLMinimization(shared, rank=2)
    data = named_patterns(view="paired")
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert trained <= set(state)
    assert not any("base_layer" in name or "vision" in name for name in state)
    other = KLMinimization(shared)
    with pytest.raises(WeightsError, match="trained tensors"):
        quiet_trainer(max_epochs=2).fit(
            other, datamodule=named_patterns(view="paired"), ckpt_path=tmp_path / "one.ckpt",
            weights_only=True,
        )  # fmt: skip


# ---- references ---------------------------------------------------------------------------------


def test_the_original_stays_what_it_was(shared, streams):
    for settings in ({}, {"rank": 2}, {"rank": 2, "trained": ["language", "projector"]}):
        method = fitted(KLMinimization(shared, lr=1e-2, **settings))
        with torch.no_grad():
            found = method.original({"retain": streams["retain"]})["retain"]
            expected = shared.answer_logits(streams["retain"])
            moved = method.model.answer_logits(streams["retain"])
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(moved.logits, expected.logits, atol=1e-2)
        assert method.model.training  # as it was before


def test_a_reference_without_adapters_is_refused_where_it_is_not_the_original(shared):
    with pytest.raises(ConfigurationError, match=r"'adapter_off', but `rank` is None"):
        NPO(shared, reference="adapter_off")
    with pytest.raises(ConfigurationError, match=r"'adapter_off', but .*projector.* is trained"):
        NPO(shared, rank=2, trained=["language", "projector"], reference="adapter_off")
    method = NPO(shared, rank=2, reference="adapter_off")
    assert not list(method.reference.buffers())  # nothing is copied


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: GradDiff(m, trained=["tower"]), r"`trained` is \['tower'\]; name one or more"),
        (lambda m: GradDiff(m, trained=["other"]), "no weights to train"),
        (lambda m: GradDiff(m, rank=2, trained=["vision"]), r"without the adapted parts"),
        (lambda m: GradDiff(m, rank=0), "`rank` is 0"),
        (lambda m: GradDiff(m, forget_weight=0), "`forget_weight` is 0"),
        (lambda m: GradDiff(m, decouple_weight=-1.0), "`decouple_weight` is -1.0"),
        (lambda m: GradDiff(m, retain_weight=-1.0), "`retain_weight` is -1.0"),
        (lambda m: GradientAscent(m, max_forget_loss=0), "`max_forget_loss` is 0"),
        (lambda m: GradientAscent(m, seq_norm="tokens"), "did you mean 'token'"),
        (lambda m: NPO(m, beta=0), "`beta` is 0"),
        (lambda m: NPO(m, retain="kll"), "did you mean 'kl'"),
        (lambda m: NPO(m, reference="copie"), "did you mean 'copy'"),
        (lambda m: PreferenceOptimization(m, refusals=[]), r"`refusals` is \[\]"),
        (lambda m: DPO(m, refusals="no"), "`refusals` is 'no'"),
    ],
)
def test_bad_settings(shared, make, message):
    with pytest.raises(ConfigurationError, match=message):
        make(shared)
