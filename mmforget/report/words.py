"""The words of the reports: names and plain explanations of roles, families and metrics."""

from __future__ import annotations

from mmforget.audit.results import Direction, Family, Results, Role

OUTCOMES: dict[str, tuple[str, str]] = {
    "forgotten": ("Forgotten", "✓"),
    "not_forgotten": ("Not forgotten", "✕"),
    "damaged": ("Forgotten, but the rest was damaged", "!"),
    "not_discriminative": ("Evaluation not discriminative", "?"),
}
"""Outcome: label, sign."""

ANSWERS_ONLY = ("Forgotten in its answers, not shown inside", "≈")
"""A model that answers as asked while a check of its inside, or of privacy, failed."""


def headline(results: Results) -> tuple[str, str, str]:
    """Label, sign and style of the verdict; green only if every check holds."""
    outcome = results.verdict.outcome
    if outcome == "forgotten" and any(check.passed is False for check in results.checks):
        return (*ANSWERS_ONLY, "damaged")
    return (*OUTCOMES[outcome], outcome)


NOT_DISCRIMINATIVE = (
    "This audit could not tell a model that forgot from one that did not. Its numbers support no "
    "conclusion; the checks say why."
)

ROLES: dict[Role, str] = {
    "original": "original",
    "unlearned": "unlearned",
    "retrained": "retrained",
    "held_out": "held-out retrained",
    "control": "control",
    "random_init": "random weights",
}

FAMILIES: dict[Family, str] = {
    "forgetting": "Forgetting: does it still know what was to go?",
    "utility": "Utility: does the rest still work?",
    "privacy": "Privacy: can one tell what it was trained on?",
    "representation": "Representation: is the knowledge still inside?",
    "relearning": "Relearning: does it come back quickly?",
    "cost": "Cost",
}

DIRECTIONS: dict[Direction, str] = {
    "higher": "↑ higher is better",
    "lower": "↓ lower is better",
    "closer_to_retrained": "≈ closer to retrained",
    "closer_to_value": "≈ closer to",
    "none": "for information",
}

STAGES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_ROLES = {
    "forget": "forget",
    "retain": "retain",
    "previous": "forgotten earlier",
    "forgotten": "all forgotten",
    "all": "all",
    "missing": "missing classes",
}

UNITS = {"seconds": "s", "passes": ""}
"""Units that are printed otherwise than they are written; `passes` are named by the metric."""

METRICS: dict[str, tuple[str, str]] = {
    "accuracy": (
        "Accuracy",
        "Share of images that are named correctly. On forgotten classes it should fall to the "
        "value of a retrained model, on everything else it should stay.",
    ),
    "retain_drop": (
        "Retain drop",
        "Accuracy lost on retained test images; the price of forgetting.",
    ),
    "worst_class_drop": (
        "Worst class drop",
        "The largest loss of a single retained class: an average hides a ruined neighbour.",
    ),
    "loss": ("Loss", "Mean cross-entropy in nats: how surprised the model is by the right answer."),
    "calibration_error": (
        "Calibration error",
        "How far the stated confidence is from the share of right answers.",
    ),
    "h_mean": (
        "H-mean",
        "One number for both aims: the harmonic mean of what was kept and of the drop on what was "
        "forgotten, against the original model.",
    ),
    "h_mean_previous": (
        "H-mean, previous model",
        "The same, with the model before this request in place of the original.",
    ),
    "adaptive_unlearning_score": (
        "Adaptive unlearning score",
        "Retained accuracy over one plus what is left on the forgotten data; a summary.",
    ),
    "tug_of_war": (
        "Tug of war",
        "1 where forget, retain and test accuracy all equal those of retrained models; a summary.",
    ),
    "average_gap": (
        "Average gap",
        "Mean distance to retrained models over accuracies and membership attack; a summary.",
    ),
    "js_to_retrained": (
        "Answer divergence (JS)",
        "How far the class probabilities are from those of retrained models; 0 is the same.",
    ),
    "kl_to_retrained": (
        "Answer divergence (KL)",
        "The same in another unit, harder on answers that a retrained model would give.",
    ),
    "activation_distance": (
        "Activation distance",
        "Euclidean distance between class probabilities and those of retrained models.",
    ),
    "agreement": ("Agreement", "How often the answer is the one that a retrained model gives."),
    "zrf": (
        "Zero-retrain forgetting",
        "How much the answers on forgotten images resemble those of an untrained network. More is "
        "not better: the goal is the value of a retrained model.",
    ),
    "membership_auc": (
        "Membership attack (AUC)",
        "Can forgotten training images be told from unseen ones by the model's confidence? 50 % is "
        "guessing; clearly below it also gives them away.",
    ),
    "membership_tpr_at_1_percent": (
        "Members found at 1 % false alarms",
        "The share of forgotten images that a careful attacker can point at.",
    ),
    "membership_tpr_at_0.1_percent": (
        "Members found at 0.1 % false alarms",
        "The same for a very careful attacker.",
    ),
    "membership_transfer": (
        "Membership, transferred attack",
        "How sure an attack that was fitted on retained data is that it trained on the forgotten.",
    ),
    "membership_validity": (
        "Validity of the attack",
        "The same attack on data that is known to be in or out. Below 55 % the model memorises too "
        "little for any statement on privacy.",
    ),
    "cka_to_original": (
        "Similarity to the original (CKA)",
        "How similar the inner representation is to that of the original model; 1 is the same.",
    ),
    "cka_to_retrained": (
        "Similarity to retrained (CKA)",
        "The same against models that never saw the data.",
    ),
    "procrustes_to_original": (
        "Distance to the original (Procrustes)",
        "A second measure of the representation, to confirm the first: distance after the best "
        "rotation; 0 is the same.",
    ),
    "procrustes_to_retrained": (
        "Distance to retrained (Procrustes)",
        "The same against models that never saw the data.",
    ),
    "knn_accuracy": (
        "Nearest neighbours",
        "Accuracy when the class is read from the nearest images in the inner representation. A "
        "retrained model is not at chance either: only the gap to it counts.",
    ),
    "probe_recall": (
        "Probe, forgotten classes",
        "Share of forgotten images that a fresh last layer recognises from the frozen inside. If "
        "it is far above retrained models, the knowledge is hidden and not gone.",
    ),
    "probe_accuracy": ("Probe, all classes", "The same probe over all classes."),
    "relearn_steps_full": (
        "Relearning steps, all layers",
        "Steps of training on a few forgotten images until 80 % of the old accuracy is back.",
    ),
    "relearn_area_full": (
        "Relearning area, all layers",
        "How fast it comes back over the whole attack: 0 as an untrained network, 1 as the "
        "original.",
    ),
    "relearn_retain_full": (
        "Retained accuracy after relearning, all layers",
        "What the attack costs on the rest.",
    ),
    "relearn_steps_head": (
        "Relearning steps, last layer",
        "The same when only the last layer is taught: it shows knowledge that is still inside.",
    ),
    "relearn_area_head": (
        "Relearning area, last layer",
        "How fast it comes back when only the last layer is taught: 0 untrained, 1 original.",
    ),
    "relearn_retain_head": (
        "Retained accuracy after relearning, last layer",
        "What the attack costs on the rest.",
    ),
    "seconds": ("Time", "Wall-clock time of the method alone, without any evaluation."),
    "sample_passes": (
        "Sample passes",
        "One image through the network, forward; forward and backward count three. It does not "
        "depend on the machine.",
    ),
    "peak_memory_bytes": ("Peak memory", "Memory that the method took in addition."),
    "share_of_retraining": ("Share of retraining", "Sample passes over those of retraining."),
    "changed_parameters": ("Changed parameters", "Share of all weights that differ from before."),
}
"""Metric: title, explanation in one or two plain sentences."""
