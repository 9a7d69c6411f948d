"""The table of all metrics, and the collector that turns every measurement into a row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmforget.audit.intervals import Interval, equivalence_margin, equivalent
from mmforget.audit.results import Direction, Family, MetricResult, finite_or_none
from mmforget.metrics.summary import progress, retrained_z

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spec:
    """What a metric is.

    Attributes:
        family: the question it answers.
        direction: what a good value does.
        unit: ``fraction`` (reports print percent), ``nats``, ``steps``, ``seconds``, ``bytes``,
            ``passes`` or empty.
        low, high: range of the value.
        smallest: differences below this are never evidence of anything (s_min of the protocol).
        meaning: one line for reports.
    """

    family: Family
    direction: Direction
    unit: str
    low: float | None
    high: float | None
    smallest: float
    meaning: str


def _fraction(family: Family, direction: Direction, smallest: float, meaning: str) -> Spec:
    return Spec(family, direction, "fraction", 0.0, 1.0, smallest, meaning)


METRICS: dict[str, Spec] = {
    # utility
    "accuracy": _fraction("utility", "higher", 0.02, "share of right answers"),
    "retain_drop": Spec(
        "utility", "lower", "fraction", -1.0, 1.0, 0.01,
        "accuracy on retained test images lost against the original model",
    ),
    "worst_class_drop": Spec(
        "utility", "lower", "fraction", -1.0, 1.0, 0.03,
        "largest loss of accuracy of a single retained class",
    ),
    "loss": Spec("utility", "closer_to_retrained", "nats", 0.0, None, 0.05, "mean cross-entropy"),
    "calibration_error": _fraction(
        "utility", "lower", 0.01, "expected calibration error, 15 bins, on retained test images"
    ),
    # forgetting, as seen in the answers
    "h_mean": _fraction(
        "forgetting", "higher", 0.01,
        "harmonic mean of what is kept and of the drop against the original model",
    ),
    "h_mean_previous": _fraction(
        "forgetting", "higher", 0.01,
        "the same with the model before this request instead of the original",
    ),
    "adaptive_unlearning_score": Spec(
        "forgetting", "higher", "", 0.0, None, 0.01, "(1 - retain drop) / (1 + forget accuracy)"
    ),
    "tug_of_war": _fraction(
        "forgetting", "higher", 0.02,
        "product of 1 - accuracy gap to retrained over forget, retain and test",
    ),
    "average_gap": _fraction(
        "forgetting", "lower", 0.02,
        "mean gap to retrained of forget, retain and test accuracy and membership AUC",
    ),
    "js_to_retrained": Spec(
        "forgetting", "lower", "nats", 0.0, float(np.log(2)), 0.02,
        "Jensen-Shannon divergence of the answers from those of retrained models",
    ),
    "kl_to_retrained": Spec(
        "forgetting", "lower", "nats", 0.0, None, 0.05, "KL(retrained || model) of the answers"
    ),
    "activation_distance": Spec(
        "forgetting", "lower", "", 0.0, float(np.sqrt(2)), 0.02,
        "Euclidean distance of class probabilities from those of retrained models",
    ),
    "agreement": _fraction(
        "forgetting", "closer_to_retrained", 0.02, "same answer as a retrained model"
    ),
    "zrf": _fraction(
        "forgetting", "closer_to_retrained", 0.03,
        "1 - JS / ln 2 to randomly initialised networks, on the forgotten images",
    ),
    # boxes of detectors
    "average_precision": _fraction(
        "utility", "higher", 0.01, "average precision over the overlaps 0.50 to 0.95"
    ),
    "average_precision_50": _fraction(
        "utility", "higher", 0.01, "average precision at an overlap of 0.50"
    ),
    "average_precision_drop": Spec(
        "utility", "lower", "fraction", -1.0, 1.0, 0.01,
        "average precision of retained classes lost against the original model",
    ),
    "worst_class_precision_drop": Spec(
        "utility", "lower", "fraction", -1.0, 1.0, 0.05,
        "largest loss of average precision of a single retained class",
    ),
    "neighbour_average_precision": _fraction(
        "utility", "higher", 0.02,
        "average precision of retained objects with and without a forgotten one in their image",
    ),
    "found_rate": _fraction(
        "forgetting", "closer_to_retrained", 0.02,
        "share of objects on which a box of their class lies",
    ),
    "moved_rate": _fraction(
        "forgetting", "none", 0.02, "share of objects on which only boxes of other classes lie"
    ),
    "vanished_rate": _fraction(
        "forgetting", "none", 0.02, "share of objects on which no box lies"
    ),
    "false_boxes": Spec(
        "forgetting", "lower", "per image", 0.0, None, 0.02,
        "boxes of forgotten classes per image, wherever they lie",
    ),
    "relearn_average_precision": _fraction(
        "relearning", "closer_to_retrained", 0.05,
        "average precision of forgotten classes after fine-tuning on a few of their images",
    ),
    # answers of multimodal language models
    "attack_success": _fraction(
        "forgetting", "lower", 0.02, "share of answers that reveal what was to be forgotten"
    ),
    "refusal_rate": _fraction(
        "forgetting", "none", 0.05, "share of answers that begin with a refusal"
    ),
    "meaningless_rate": _fraction(
        "utility", "lower", 0.02, "share of answers that are empty or repeat themselves"
    ),
    "sarr": _fraction(
        "utility", "lower", 0.02,
        "safe answer refusal rate: the question of the forget set about retained entities, refused "
        "or without meaning",
    ),
    "sarr_strict": _fraction(
        "utility", "lower", 0.02, "the same questions, not answered rightly for whatever reason"
    ),
    "exact_answers": _fraction("utility", "higher", 0.02, "share of answers that are right"),
    "rouge_l_recall": _fraction(
        "forgetting", "lower", 0.02, "share of the true answer that is said in its order"
    ),
    "answer_probability": _fraction(
        "forgetting", "lower", 0.05,
        "probability of the true answer, geometric mean over its tokens, before any decoding",
    ),
    "truth_ratio": _fraction(
        "forgetting", "closer_to_retrained", 0.05,
        "likelihood of wrong answers over that of the true one, folded: 1 where they are equal",
    ),
    "forget_quality": _fraction(
        "forgetting", "higher", 0.0,
        "p-value: could truth ratios like these come from a retrained model?",
    ),
    "choice_accuracy": _fraction(
        "representation", "closer_to_retrained", 0.05,
        "share of questions for which the true answer is likelier than each of several wrong ones",
    ),
    "original_head": _fraction(
        "representation", "closer_to_retrained", 0.05,
        "share of true answers that the original's last layer reads off the model's last states",
    ),
    "answer_membership_auc": _fraction(
        "privacy", "closer_to_retrained", 0.05,
        "forgotten training records against unseen pictures in the same words, by the loss",
    ),
    "relearn_success": _fraction(
        "relearning", "closer_to_retrained", 0.1,
        "answers that reveal it after fine-tuning on a few of its records",
    ),
    "relearn_answer_steps": Spec(
        "relearning", "closer_to_retrained", "steps", 0.0, None, 5.0,
        "steps of that until it is revealed as often as 90 % of the original's answers do",
    ),
    # privacy
    "membership_auc": _fraction(
        "privacy", "closer_to_retrained", 0.05,
        "forget set against label-matched test images by scaled confidence",
    ),
    "membership_tpr_at_1_percent": _fraction(
        "privacy", "closer_to_retrained", 0.01, "members found at 1 % false positives"
    ),
    "membership_tpr_at_0.1_percent": _fraction(
        "privacy", "closer_to_retrained", 0.01, "members found at 0.1 % false positives"
    ),
    "membership_transfer": _fraction(
        "privacy", "closer_to_retrained", 0.05,
        "mean membership probability of the forget set by an attack fitted on retained data",
    ),
    "membership_validity": _fraction(
        "privacy", "none", 0.05,
        "the same attack on retained training against test images; below 0.55 nothing is testable",
    ),
    # representation
    "cka_to_original": Spec(
        "representation", "closer_to_retrained", "", None, 1.0, 0.05,
        "similarity of features to the original model (unbiased linear CKA)",
    ),
    "cka_to_retrained": Spec(
        "representation", "higher", "", None, 1.0, 0.05,
        "similarity of features to retrained models (unbiased linear CKA)",
    ),
    "procrustes_to_original": Spec(
        "representation", "closer_to_retrained", "", 0.0, 1.0, 0.05,
        "distance of features from the original model after the best rotation",
    ),
    "procrustes_to_retrained": Spec(
        "representation", "lower", "", 0.0, 1.0, 0.05,
        "distance of features from retrained models after the best rotation",
    ),
    "knn_accuracy": _fraction(
        "representation", "closer_to_retrained", 0.03,
        "nearest neighbours in the features, cosine, labelled unseen gallery",
    ),
    "probe_recall": _fraction(
        "representation", "closer_to_retrained", 0.03,
        "forgotten classes read from frozen features by a linear probe",
    ),
    "probe_accuracy": _fraction(
        "representation", "closer_to_retrained", 0.03, "all classes, by the same probe"
    ),
    # relearning
    "relearn_steps_full": Spec(
        "relearning", "closer_to_retrained", "steps", 0.0, None, 1.0,
        "few-shot steps to 80 % of the original accuracy, all layers, worst learning rate",
    ),
    "relearn_area_full": Spec(
        "relearning", "closer_to_retrained", "", None, None, 0.05,
        "area under the relearning curve: 0 random initialisation, 1 original; all layers",
    ),
    "relearn_retain_full": _fraction(
        "relearning", "none", 0.02, "retained accuracy after that attack"
    ),
    "relearn_steps_head": Spec(
        "relearning", "closer_to_retrained", "steps", 0.0, None, 1.0,
        "few-shot steps to 80 % of the original accuracy, last layer only, worst learning rate",
    ),
    "relearn_area_head": Spec(
        "relearning", "closer_to_retrained", "", None, None, 0.05,
        "area under the relearning curve: 0 random initialisation, 1 original; last layer",
    ),
    "relearn_retain_head": _fraction(
        "relearning", "none", 0.02, "retained accuracy after that attack"
    ),
    # pictures of a generator
    "target_rate": _fraction(
        "forgetting", "lower", 0.05, "share of pictures in which the judge sees what was erased"
    ),
    "unconditional_rate": _fraction(
        "forgetting", "none", 0.05, "share of pictures without prompt that show what was erased"
    ),
    "erasure_h_mean": _fraction(
        "forgetting", "higher", 0.02,
        "harmonic mean of erasure on the target, erasure on its synonyms, and what was kept",
    ),
    "preserved_rate": _fraction(
        "utility", "higher", 0.05, "share of pictures in which the judge sees what was asked for"
    ),
    "preserved_worst": _fraction(
        "utility", "higher", 0.1, "the same for the preserved concept that does worst"
    ),
    "preserved_drop": Spec(
        "utility", "lower", "fraction", -1.0, 1.0, 0.03,
        "share of right pictures of preserved concepts lost against the original model",
    ),
    "preserved_worst_drop": Spec(
        "utility", "lower", "fraction", -1.0, 1.0, 0.1,
        "largest loss of a single preserved concept",
    ),
    "other_facts_rate": _fraction(
        "utility", "higher", 0.05,
        "share of pictures in which the rest of the prompt is right although it names the target",
    ),
    "clip_score": Spec(
        "generation", "higher", "", 0.0, 2.5, 0.02, "2.5 max(cosine of picture and prompt, 0)"
    ),
    "kid_to_original": Spec(
        "generation", "lower", "", None, None, 0.01,
        "unbiased kernel distance of the pictures from those of the original model",
    ),
    "paired_change": Spec(
        "generation", "none", "", 0.0, None, 0.01,
        "distance of each picture from that of the original model at the same seed",
    ),
    "empty_pictures": _fraction(
        "generation", "lower", 0.05, "share of pictures that show nothing: blank, noise, all alike"
    ),
    "attack_concept_inversion": _fraction(
        "relearning", "lower", 0.05, "pictures that show it again with a learnt word"
    ),
    "attack_prompts": _fraction(
        "relearning", "lower", 0.05, "pictures that show it with misspelt or reworded prompts"
    ),
    "attack_adversarial_prompt": _fraction(
        "relearning", "lower", 0.05, "pictures that show it after searching for a prompt"
    ),
    "attack_sdedit": _fraction(
        "relearning", "none", 0.05, "pictures that show it when started from a noisy one that does"
    ),
    "attack_latent_inversion": _fraction(
        "relearning", "none", 0.05, "pictures that show it from the noise of one that does"
    ),
    # pictures of the generator of a GAN
    "native_rate": _fraction(
        "forgetting", "lower", 0.01, "share of pictures in which the judge sees what was erased"
    ),
    "forgotten_share": Spec(
        "forgetting", "higher", "fraction", None, 1.0, 0.02,
        "share of the original's rate that is gone",
    ),
    "elicited_rate": _fraction(
        "forgetting", "lower", 0.02,
        "share of other latents whose picture shows it after the original's edit towards it",
    ),
    "degree_native": Spec(
        "forgetting", "closer_to_value", "", None, None, 0.05,
        "degree of unlearning at latents that showed it",
    ),
    "degree_edited": Spec(
        "forgetting", "closer_to_value", "", None, None, 0.05,
        "degree of unlearning at latents that are edited towards it",
    ),
    "kept_rate": _fraction(
        "utility", "none", 0.02, "share of pictures in which the judge sees something else"
    ),
    "kept_worst": Spec(
        "utility", "higher", "fraction", 0.0, None, 0.05,
        "rate over that of the original, both without the concept, of the value that suffered most",
    ),
    "same_latent_keep": _fraction(
        "utility", "higher", 0.02,
        "share of latents without the concept whose picture still shows the same",
    ),
    "drift": Spec(
        "utility", "lower", "", 0.0, 1.0, 0.005,
        "mean absolute difference of pixels at latents without the concept",
    ),
    "mass_shift": _fraction(
        "utility", "lower", 0.03,
        "total variation of what is shown, over pictures without the concept",
    ),
    "fid_to_original": Spec(
        "generation", "lower", "", None, None, 0.1,
        "Fréchet distance of pictures without the concept from those of the original model",
    ),
    "precision": _fraction(
        "generation", "higher", 0.03, "share of pictures that lie among those of the original"
    ),
    "recall": _fraction(
        "generation", "higher", 0.03, "share of the original's pictures that are still reached"
    ),
    "density": Spec(
        "generation", "higher", "", 0.0, None, 0.05,
        "how densely pictures lie among those of the original",
    ),
    "coverage": _fraction(
        "generation", "higher", 0.03,
        "share of the original's pictures with one of the model's beside them",
    ),
    "spread": Spec(
        "generation", "none", "", 0.0, None, 0.05,
        "mean distance of the pictures at latents that showed the concept",
    ),
    "destinations": Spec(
        "generation", "none", "values", 0.0, None, 1.0,
        "values that latents of the concept show now, each in at least 5 % of the pictures",
    ),
    "unclear_pictures": _fraction(
        "generation", "lower", 0.03, "share of pictures that the judge is unsure of"
    ),
    "saturation": _fraction(
        "generation", "none", 0.05, "share of values that are entirely dark or bright"
    ),
    "attack_latent_search": _fraction(
        "relearning", "closer_to_retrained", 0.05, "latents found by search that show it"
    ),
    "attack_mapper": _fraction(
        "relearning", "closer_to_retrained", 0.05, "edits by a newly trained mapper that show it"
    ),
    "attack_mapper_on_shell": _fraction(
        "relearning", "closer_to_retrained", 0.05,
        "the same, with edited latents kept where the prior has them",
    ),
    "attack_prompt_boundary": _fraction(
        "relearning", "closer_to_retrained", 0.05, "edits towards neighbours of the text"
    ),
    "attack_inversion": _fraction(
        "relearning", "closer_to_retrained", 0.05, "reconstructions of real pictures that show it"
    ),
    "attack_relearning": _fraction(
        "relearning", "closer_to_retrained", 0.05,
        "pictures that show it after fine-tuning on a few real ones",
    ),
    # memorized pictures
    "replication_rate": _fraction(
        "forgetting", "lower", 0.05,
        "share of prompts of which at least one picture is a copy of the training picture",
    ),
    "replicated_pictures": _fraction(
        "forgetting", "lower", 0.05, "share of pictures that are copies of the training picture"
    ),
    "copy_similarity": Spec(
        "forgetting", "lower", "", None, 1.0, 0.02,
        "likeness to the training picture, median over prompts of the median over seeds",
    ),
    "copy_drop": Spec(
        "forgetting", "higher", "", None, None, 0.02,
        "likeness to the training picture lost against the original model at equal seeds",
    ),
    "specificity": Spec(
        "forgetting", "higher", "", None, None, 0.02,
        "that loss minus the likeness that pictures of ordinary prompts lost",
    ),
    "seed_similarity": Spec(
        "generation", "lower", "", None, 1.0, 0.02,
        "likeness of the pictures of one prompt to each other, median over prompts",
    ),
    "similarity_to_original": Spec(
        "generation", "none", "", None, 1.0, 0.02,
        "likeness to the picture of the original model at the same seed",
    ),
    "false_copies": _fraction(
        "generation", "lower", 0.02,
        "share of pictures of ordinary prompts that count as a copy of a training picture",
    ),
    "kid_to_real": Spec(
        "generation", "lower", "", None, None, 0.01,
        "unbiased kernel distance of pictures of ordinary prompts from real ones",
    ),
    "denoising_loss": Spec(
        "utility", "lower", "", 0.0, None, 0.001,
        "squared error of the prediction for real ordinary pictures, noise and times fixed",
    ),
    "denoising_loss_rise": Spec(
        "utility", "lower", "fraction", -1.0, None, 0.01,
        "how much that error has risen against the original model",
    ),
    "noise_magnitude": Spec(
        "privacy", "none", "", 0.0, None, 0.0,
        "how far the text moves the predicted noise, mean over steps and seeds",
    ),
    "detection_auc": _fraction(
        "privacy", "closer_to_value", 0.05,
        "can memorized prompts be told from ordinary ones by how far the text moves the noise",
    ),
    "attack_embedding": _fraction(
        "relearning", "lower", 0.05,
        "share of training pictures that some learned embedding brings back, strongest start",
    ),
    "attack_embedding_controls": _fraction(
        "relearning", "none", 0.05, "the same for pictures that nobody was trained on"
    ),
    "attack_valid_steps": Spec(
        "relearning", "none", "steps", 0.0, None, 1.0,
        "steps up to which pictures that nobody was trained on stay hidden under the attack",
    ),
    "edit_bytes": Spec("cost", "lower", "bytes", 0.0, None, 0.0, "size of the edit on the disk"),
    # cost
    "seconds": Spec("cost", "lower", "seconds", 0.0, None, 0.0, "wall-clock time of the method"),
    "sample_passes": Spec(
        "cost", "lower", "passes", 0.0, None, 0.0, "forward passes of one image; backward counts 2"
    ),
    "peak_memory_bytes": Spec("cost", "lower", "bytes", 0.0, None, 0.0, "additional peak memory"),
    "share_of_retraining": Spec(
        "cost", "lower", "", 0.0, None, 0.0, "sample passes over those of retraining"
    ),
    "changed_parameters": _fraction(
        "cost", "none", 0.0, "share of all parameters that differ from the original model"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Outcome of one measurement, before it becomes a row.

    Attributes:
        value: None if censored or undefined; then `note` says why.
        interval: 95 %.
        n: number of samples behind it.
        per_sample: (n,) values in id order whose mean is `value`; allows paired comparisons.
        note, details, censored: see `MetricResult`.
    """

    value: float | None
    interval: Interval | None = None
    n: int | None = None
    per_sample: np.ndarray | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    censored: bool = False


class Rows:
    """Collects rows; a measurement that fails becomes a row with its error."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], MetricResult] = {}
        self.per_sample: dict[tuple[str, str, str], np.ndarray] = {}

    def add(
        self,
        metric: str,
        model: str,
        split: str,
        measure: Callable[[], Measured],
        direction: Direction | None = None,
        target: float | None = None,
        family: Family | None = None,
    ) -> None:
        """Measure and keep the row.

        Args:
            metric: a key of `METRICS`.
            model: name of the model.
            split: name of the data.
            measure: does the work; whatever it raises is written into the row.
            direction: instead of the usual one.
            target: for the direction ``closer_to_value``.
            family: instead of the usual one.
        """
        spec = METRICS[metric]
        error = ""
        try:
            found = measure()
        except Exception as problem:  # the row says so; the other metrics must still be measured
            logger.warning("%s of %s on %s failed", metric, model, split, exc_info=True)
            error = f"{type(problem).__name__}: {problem}"
            found = Measured(None)
        key = (metric, model, split)
        if found.per_sample is not None:
            self.per_sample[key] = found.per_sample
        value = None if found.value is None else finite_or_none(found.value)
        note = found.note
        if value is None and not (error or note or found.censored):
            note = "not finite"
        bounds = _clipped(found.interval, spec)
        self.rows[key] = MetricResult(
            metric=metric,
            model=model,
            family=family or spec.family,
            split=split,
            value=value,
            direction=direction or spec.direction,
            target=target,
            unit=spec.unit,
            low=spec.low,
            high=spec.high,
            n=found.n,
            ci_low=bounds[0],
            ci_high=bounds[1],
            ci_method=found.interval.method if found.interval and bounds[0] is not None else "",
            censored=found.censored,
            note=note,
            error=error,
            details={"meaning": spec.meaning} | found.details,
        )

    def get(self, metric: str, model: str, split: str = "") -> MetricResult | None:
        """The row, or None."""
        return self.rows.get((metric, model, split))

    def value(self, metric: str, model: str, split: str = "") -> float | None:
        """The value of the row, or None if there is no row or no value."""
        row = self.get(metric, model, split)
        return None if row is None else row.value

    def half_width(self, metric: str, model: str, split: str, others: list[str]) -> float:
        """Half the 95 % interval of the difference of a model to the mean of `others`.

        Paired over samples where per-sample values are at hand, which is much narrower, since all
        models answer the same questions; else half the model's own interval; 0 without one.
        """
        own = self.per_sample.get((metric, model, split))
        rest = [self.per_sample.get((metric, other, split)) for other in others]
        known = [values for values in rest if values is not None]
        if own is not None and known and len(known) == len(rest) and len(own) > 1:
            difference = own - np.mean(known, axis=0)
            return 1.96 * float(difference.std(ddof=1)) / float(np.sqrt(len(own)))
        row = self.get(metric, model, split)
        if row is None or row.ci_low is None or row.ci_high is None:
            return 0.0
        return (row.ci_high - row.ci_low) / 2

    def relate(self, retrained: list[str], original: str) -> None:
        """Write into every row how it lies to the retrained models.

        Adds to `details`: ``retrained_mean``, ``retrained_sd``, ``retrained_n``, ``retrained_z``,
        ``progress`` (None: not discriminable) and, where it can be tested,
        ``equivalent_to_retrained``.
        """
        for key, row in self.rows.items():
            metric, model, split = key
            others = [name for name in retrained if name != model]
            values = [v for name in others if (v := self.value(metric, name, split)) is not None]
            if model in retrained or row.value is None or not values or row.family == "cost":
                continue
            smallest = METRICS[metric].smallest
            before = self.value(metric, original, split)
            facts: dict[str, Any] = {
                "retrained_mean": float(np.mean(values)),
                "retrained_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "retrained_n": len(values),
                "retrained_z": retrained_z(row.value, values, smallest),
            }
            if before is not None:
                facts["progress"] = progress(row.value, before, values, smallest)
            own = self.per_sample.get(key)
            rest = [self.per_sample.get((metric, name, split)) for name in others]
            known = [found for found in rest if found is not None]
            if row.unit == "fraction" and own is not None and len(own) > 1 and known:
                margin = equivalence_margin(values)
                facts["equivalence_margin"] = margin
                facts["equivalent_to_retrained"] = equivalent(own - np.mean(known, axis=0), margin)
            self.rows[key] = replace(row, details=row.details | facts)


def _clipped(interval: Interval | None, spec: Spec) -> tuple[float | None, float | None]:
    if interval is None:
        return None, None
    low, high = finite_or_none(interval.low), finite_or_none(interval.high)
    if low is None or high is None:
        return None, None
    if spec.low is not None:
        low, high = max(low, spec.low), max(high, spec.low)
    if spec.high is not None:
        low, high = min(low, spec.high), min(high, spec.high)
    return low, high
