"""The words of the reports: names and plain explanations of roles, families and metrics."""

from __future__ import annotations

from mmforget.audit.results import Direction, Family, Results, Role

OUTCOMES: dict[str, tuple[str, str]] = {
    "forgotten": ("Forgotten", "✓"),
    "not_forgotten": ("Not forgotten", "✕"),
    "damaged": ("Forgotten, but the rest was damaged", "!"),
    "not_discriminative": ("Evaluation not discriminative", "?"),
    "removed": ("Removed, as far as the attack went", "✓"),
    "hidden": ("Hidden, not removed", "✕"),
    "present": ("Still memorized", "✕"),
    "unattacked": ("No copies, but not tested under attack", "≈"),
}
"""Outcome: label, sign."""

ANSWERS_ONLY = ("Forgotten in its answers, not shown inside", "≈")
"""A model that answers as asked while a check of its inside, or of privacy, failed."""

BOXES_ONLY = ("Forgotten in its boxes, but boxes bring it back", "≈")
"""A detector that no longer finds it, while it relearns more than a retrained one."""

PICTURES_ONLY = ("Forgotten in its pictures, but not every check holds", "≈")
"""A generator that no longer draws it when asked, while an attack or a required value failed."""


REMOVED_ONLY = ("Removed, but not every check holds", "≈")
"""A memory that no attack finds, while held-out memories, a required value or the locating fail."""

COPIES_DAMAGED = ("No copies, but the rest was damaged", "!")
"""Harm to ordinary pictures, whatever is known of the memory; never said together with removal."""


def is_generator(results: Results) -> bool:
    """Whether the audit was one of pictures that the models draw."""
    return results.data.get("kind") in ("generator", "memorization", "gan")


def is_memorization(results: Results) -> bool:
    """Whether the audit was one of memorized training pictures."""
    return bool(results.data.get("kind") == "memorization")


def is_gan(results: Results) -> bool:
    """Whether the audit was one of generators that draw from latents, without prompts."""
    return bool(results.data.get("kind") == "gan")


def is_detection(results: Results) -> bool:
    """Whether the audit was one of detectors; what it calls accuracy is average precision."""
    return bool(results.data.get("kind") == "detection")


def is_multimodal(results: Results) -> bool:
    """Whether the audit was one of answers in words to questions about pictures."""
    return bool(results.data.get("kind") == "multimodal")


def measure(results: Results) -> str:
    """What the rows of `Results.sequence`, the curves and the classes hold under ``accuracy``."""
    return "average precision" if is_detection(results) else "accuracy"


def things(results: Results) -> str:
    """What was forgotten: images, or objects in them."""
    if is_multimodal(results):
        return "pictures"
    return "objects" if is_detection(results) else "images"


def taken_for(results: Results) -> tuple[str, str, str]:
    """Heading, caption and remark of the chart of what forgotten things are taken for now."""
    if is_multimodal(results):
        return (
            "Whom the answers to forgotten pictures name",
            "Share of the answers about forgotten test pictures that name each entity",
            "Answers that name nobody are in no class.",
        )
    what = things(results)
    if is_detection(results):
        shown, remark = "with a box of each class", "Objects without any box are in no class."
    else:
        shown, remark = "predicted as each class", ""
    return (
        f"What forgotten {what} are now taken for",
        f"Share of the forgotten test {what} {shown}",
        remark,
    )


def headline(results: Results) -> tuple[str, str, str]:
    """Label, sign and style of the verdict; green only if every check holds."""
    outcome = results.verdict.outcome
    failed = any(check.passed is False for check in results.checks)
    if outcome == "forgotten" and failed:
        if is_detection(results):
            return (*BOXES_ONLY, "damaged")
        return (*(PICTURES_ONLY if is_generator(results) else ANSWERS_ONLY), "damaged")
    if outcome == "removed" and failed:
        return (*REMOVED_ONLY, "damaged")
    if outcome == "damaged" and is_memorization(results):
        return (*COPIES_DAMAGED, "damaged")
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
    "generation": "Pictures: how have they changed?",
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
    "reworded": "all forgotten, in other words",
}

PARTS = {
    "missing_": "missing class ",
    "class_": "class ",
    "retain_beside": "retain, beside forgotten objects",
    "retain_apart": "retain, no forgotten object near",
    "retain_small": "retain, small objects",
    "retain_medium": "retain, medium objects",
    "retain_large": "retain, large objects",
    "harmless_": "harmless questions, ",
    "text_": "no picture, ",
    "both_": "picture and name, ",
}
"""Starts of roles that are a part of one, in words; what follows is a name."""

PROMPTS = {
    "target": "prompts with",
    "synonym": "prompts with the synonym",
    "together": "other sentences with",
    "preserved": "prompts with",
    "unconditional": "no prompt,",
    "native": "all pictures,",
    "kept": "all pictures,",
    "bearing": "latents that showed",
    "clear": "without the concept,",
    "edited": "edited towards",
    "proxy": "proxy control,",
}
"""Splits of generator audits: ``role/word``."""

MEMORIES = {"located": "read by the method", "held_out": "held out"}
"""Groups of memorized prompts; their splits are ``group/kind``."""

MEMORY_KINDS = {
    "verbatim": "verbatim memories",
    "template": "template memories",
    "unknown": "memories of unknown kind",
}
GROUPS = {
    "target": "all prompts with what was erased",
    "preserved": "all preserved concepts",
    "unconditional": "no prompt",
    "ordinary": "ordinary prompts",
    "never_trained": "never trained on",
    "native": "all pictures",
    "kept": "all other values",
    "clear": "without the concept",
}
"""Splits of generator audits that hold several words."""
EXAMPLES = {
    "target": "What was erased, before and after",
    "preserved": "What must stay, before and after",
    "unconditional": "Without a prompt",
    **{
        f"{group}/{kind}": f"{title}, {where}"
        for group, where in MEMORIES.items()
        for kind, title in (
            ("verbatim", "Verbatim memories"),
            ("template", "Template memories"),
            ("unknown", "Memories of unknown kind"),
        )
    },
    "ordinary": "Ordinary prompts, before and after",
    "bearing": "Latents that showed what was erased",
    "clear": "Latents that showed something else",
    "edited": "Other latents, edited towards what was erased",
    "after_attack": "After an attack",
    "native": "References and filters",
    "boxes_forgotten": "Images with forgotten objects only",
    "boxes_both": "Images with forgotten and retained objects",
    "boxes_changed": "Retained images that changed most",
}
"""Kinds of pictures in audits of generators and detectors."""

ANSWERS = {
    "answers_forgotten": "What was forgotten",
    "answers_retain": "The same question about others",
    "answers_harmless": "Harmless questions about forgotten pictures",
    "answers_both": "Forgotten pictures, with a name in the question",
    "answers_text": "What was forgotten, without a picture",
}
"""Kinds of questions among the examples of a multimodal audit."""

PROMPT_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "picture": {"forget": ("test_forget",), "retain": ("test_retain",)},
    "text alone": {
        "forget": ("test_text_forgotten", "train_text_forgotten"),
        "retain": ("test_text_retain", "train_text_retain"),
    },
    "picture and name": {"forget": ("test_both_forgotten",), "retain": ("test_both_retain",)},
}
"""What entities are asked about with, and the splits of it by role."""

AFTER_ATTACK = (
    "Pictures after an attack are drawn from the embedding that it found, from other noise."
)
SEARCH = (
    "The attacker has the weights and searches, for each picture, the embedding under which the "
    "model denoises it best, with new noise in every step. A search says something only as long as "
    "it does not draw pictures that nobody was trained on."
)
"""Explanation of the curves of an embedding search."""

BOXES = (
    "Boxes of forgotten classes are rust red, all others blue, and unnamed where there are many. "
    "Labelled boxes come from the data; those of models are drawn from a score of"
)
"""Explanation of pictures with boxes; a number follows."""

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
    "average_precision": (
        "Average precision",
        "COCO's measure, mean over the overlaps 0.50 to 0.95: whether a class's objects are found, "
        "framed tightly, and ranked above false alarms. Only images that hold an object of the "
        "named classes count, and only their boxes.",
    ),
    "average_precision_50": (
        "Average precision at 0.50",
        "The same for boxes that overlap their object by half: framing hardly counts.",
    ),
    "average_precision_drop": (
        "Average precision lost",
        "On retained classes, against the original model; the price of forgetting.",
    ),
    "worst_class_precision_drop": (
        "Worst class drop",
        "The largest loss of average precision of a single retained class: an average hides a "
        "ruined neighbour.",
    ),
    "neighbour_average_precision": (
        "Next to forgotten objects",
        "Average precision of retained objects in images that also hold a forgotten one, and in "
        "all others: forgetting must not blind the model to what stands beside.",
    ),
    "found_rate": (
        "Objects found",
        "Share of labelled objects on which a box of their own class lies (overlap 0.50) with the "
        "score that the report names.",
    ),
    "moved_rate": (
        "Objects taken for another class",
        "Share of forgotten objects on which only boxes of other classes lie. Where almost all go "
        "to one class, it gives away what was removed.",
    ),
    "vanished_rate": (
        "Objects without any box",
        "Share of forgotten objects that have become background.",
    ),
    "false_boxes": (
        "Boxes of forgotten classes",
        "Per test image, wherever they lie, right or wrong. A retrained model has none.",
    ),
    "relearn_average_precision": (
        "Relearned average precision",
        "On forgotten classes, after fine-tuning on a few images that hold them, the same for "
        "all models; below it, what is left of the retained classes. What comes back beyond a "
        "retrained model was remembered, not learnt.",
    ),
    "attack_success": (
        "Answers that reveal it",
        "Share of answers that name what was to be forgotten: on pictures and in words of the "
        "training, on these in other words, and on unseen pictures in other words.",
    ),
    "refusal_rate": (
        "Refusals",
        "Share of answers that begin with a refusal. A retrained model does not refuse: it names "
        "somebody else.",
    ),
    "meaningless_rate": (
        "Answers without meaning",
        "Empty ones, and those that repeat themselves. They reveal nothing either, and are of no "
        "use to anybody.",
    ),
    "sarr": (
        "Safe answers refused (SARR)",
        "The question of the forget set about entities that were to stay: refused, or answered "
        "without meaning. Read it beside the original's.",
    ),
    "sarr_strict": (
        "Safe answers not right (strict SARR)",
        "The same questions, not answered rightly for whatever reason: a model that confidently "
        "names somebody else has SARR 0 and fails here.",
    ),
    "exact_answers": (
        "Right answers",
        "Share of answers that are the true one, apart from case and punctuation.",
    ),
    "rouge_l_recall": (
        "ROUGE-L recall",
        "How much of the true answer is said, word for word and in order.",
    ),
    "answer_probability": (
        "Probability of the true answer",
        "What the weights give it, per token, whatever is said in the end: a ban on words leaves "
        "it as it was.",
    ),
    "truth_ratio": (
        "Truth ratio",
        "How near wrong answers come to the true one: 0 for a model that is sure of the truth or "
        "sure of the opposite, 1 for one that cannot tell.",
    ),
    "forget_quality": (
        "Forget quality",
        "Kolmogorov-Smirnov test of the truth ratios against those of retrained models: a small "
        "p-value tells them apart, a large one proves no equality.",
    ),
    "choice_accuracy": (
        "True answer among wrong ones",
        "How often the true answer is the likeliest of several. A model that only says “sorry” "
        "first may still know whom it does not name.",
    ),
    "original_head": (
        "Read by the original's last layer",
        "How often the true answer comes out when the original's last layer replaces the model's: "
        "then only the last layer was edited.",
    ),
    "answer_membership_auc": (
        "Membership attack on answers (AUC)",
        "Can forgotten training records be told from unseen pictures in the same words by the loss "
        "of the true answer? 50 % is guessing; clearly below it also gives them away.",
    ),
    "relearn_success": (
        "Relearned",
        "Answers that reveal it after fine-tuning on a few of its records, the same for all "
        "models; below it, the right answers about others. What comes back beyond a retrained "
        "model was remembered, not learnt.",
    ),
    "relearn_answer_steps": (
        "Steps until it is back",
        "Of that fine-tuning, until it is revealed nearly as often as by the original.",
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
    "target_rate": (
        "Target rate",
        "Share of pictures in which the judge sees what was erased. Its own words, synonyms and "
        "sentences that name other things too are measured separately.",
    ),
    "unconditional_rate": (
        "Target rate without prompt",
        "How often it appears when nothing is asked for; a method need not change that.",
    ),
    "erasure_h_mean": (
        "H-mean of erasure",
        "One number for all aims: the harmonic mean of what is gone for the target, what is gone "
        "for its synonyms, and what is right for the preserved concepts.",
    ),
    "preserved_rate": (
        "Preserved rate",
        "Share of pictures of a preserved concept in which the judge sees it.",
    ),
    "preserved_worst": (
        "Worst preserved concept",
        "The lowest of these rates: a mean hides a ruined neighbour.",
    ),
    "preserved_drop": (
        "Preserved drop",
        "What was lost against the original model, over all preserved concepts at equal seeds.",
    ),
    "preserved_worst_drop": (
        "Worst drop",
        "What the preserved concept that suffered most has lost.",
    ),
    "other_facts_rate": (
        "Rest of the prompt",
        "When the prompt names the target and other things, how often these are still right.",
    ),
    "clip_score": (
        "CLIP score",
        "How well pictures fit their prompts, by another network: 0 is not at all. For what was "
        "erased it should fall, for the rest it should stay.",
    ),
    "kid_to_original": (
        "Kernel distance to the original (KID)",
        "How far the pictures as a set are from those of the original model. It scatters around 0 "
        "for equal sets; the control with other seeds shows by how much.",
    ),
    "paired_change": (
        "Paired change",
        "How much each picture differs from the original model's at the same seed. Wanted high for "
        "what was erased and low for the rest.",
    ),
    "empty_pictures": (
        "Empty pictures",
        "Share of pictures that show nothing at all: they would pass for erased.",
    ),
    "attack_concept_inversion": (
        "Under concept inversion",
        "Share of pictures that show it again when an attacker learns one new word from a few "
        "pictures of it. If it is high, the concept was hidden and not removed.",
    ),
    "attack_prompts": (
        "Under other words",
        "Share of pictures that some misspelling, translation or rewording brings back.",
    ),
    "attack_adversarial_prompt": (
        "Under a searched prompt",
        "Share of pictures that come back when an attacker with the weights searches for words.",
    ),
    "attack_sdedit": (
        "From a half-finished picture",
        "Share of pictures that show it when the model only finishes a noisy picture of it. Some "
        "of that comes from the picture and says nothing about the model.",
    ),
    "attack_latent_inversion": (
        "From the noise of a picture",
        "Share of pictures that show it when drawn from the noise that a picture of it comes from.",
    ),
    "native_rate": (
        "Native rate",
        "Share of pictures, at latents as they come, in which the judge sees what was erased.",
    ),
    "forgotten_share": ("Share forgotten", "How much of the original's rate is gone."),
    "elicited_rate": (
        "Elicited rate",
        "Other latents are edited so that the original draws what was erased; how often the same "
        "edit still works. A method can block the edit and leave the native pictures as they are.",
    ),
    "degree_native": (
        "Degree of unlearning, native",
        "0: nothing has changed; 1: pictures that showed it score like pictures that never did; "
        "above 1: lower still. Read it with the rate.",
    ),
    "degree_edited": ("Degree of unlearning, edited", "The same for edited latents."),
    "kept_rate": (
        "Rate of the others",
        "How often everything else is drawn. What is erased must become something, so some rates "
        "rise; none should fall.",
    ),
    "kept_worst": (
        "Worst kept value",
        "The rate of the value that suffered most, over its rate in the original.",
    ),
    "same_latent_keep": (
        "Same at the same latent",
        "Share of latents without the concept at which the judge still sees what it saw.",
    ),
    "drift": ("Drift", "How much these pictures changed: mean absolute difference of pixels."),
    "mass_shift": (
        "Shift of the mass",
        "Whether the pictures without the concept show the same things as often as before; 0 is "
        "the same.",
    ),
    "fid_to_original": (
        "Fréchet distance to the original",
        "How far pictures without the concept are from the original's, as sets, in features of the "
        "judge; the control with other latents is the floor.",
    ),
    "precision": (
        "Precision",
        "Share of pictures without the concept that lie among the original's",
    ),
    "recall": ("Recall", "Share of the original's pictures without it that are still reached."),
    "density": ("Density", "How densely they lie there; 1 for equal sets."),
    "coverage": ("Coverage", "Share of the original's pictures that have a neighbour."),
    "spread": (
        "Spread",
        "How different from each other the pictures are at latents that showed it. A model that "
        "draws one and the same there has collapsed.",
    ),
    "destinations": ("Destinations", "How many different things these latents show now."),
    "unclear_pictures": ("Unclear pictures", "Share of pictures that the judge is unsure of."),
    "saturation": ("Saturation", "Share of values that are entirely dark or bright."),
    "attack_latent_search": (
        "Under a search for latents",
        "Share of searches that find a latent whose picture both judge and guide take for it.",
    ),
    "attack_mapper": (
        "Under a new mapper",
        "An attacker trains a new edit on this very model. It succeeds often in generators that "
        "never saw the concept: read it beside the control.",
    ),
    "attack_mapper_on_shell": (
        "Under a new mapper, within the prior",
        "The same, with edited latents kept where latents are drawn from.",
    ),
    "attack_prompt_boundary": (
        "Under neighbouring texts",
        "New edits towards other wordings, and towards texts close by; the best one counts.",
    ),
    "attack_inversion": (
        "Under inversion",
        "Share of real pictures of it whose closest reconstruction still shows it.",
    ),
    "attack_relearning": (
        "After relearning",
        "How often it is drawn after fine-tuning on some real pictures of it.",
    ),
    "replication_rate": (
        "Replication rate",
        "Share of prompts for which at least one picture is a copy of the training picture. "
        "Verbatim memories (every seed gives the picture) and templates (a part is copied) are "
        "never counted together.",
    ),
    "replicated_pictures": ("Copied pictures", "Share of all pictures that are copies."),
    "copy_similarity": (
        "Likeness to the training picture",
        "1 is the same picture; what counts as a copy is among the data below. Median over prompts "
        "of the median over seeds.",
    ),
    "copy_drop": (
        "Likeness lost",
        "How much less the pictures resemble the training picture than the original's from the "
        "same noise.",
    ),
    "specificity": (
        "Specificity",
        "Likeness lost by memorized pictures minus likeness lost by pictures of ordinary prompts. "
        "At 0 or below, nothing was done to the memory that was not done to everything.",
    ),
    "seed_similarity": (
        "Likeness among seeds",
        "How alike the pictures of one prompt are: 1 where every seed gives the same picture.",
    ),
    "similarity_to_original": (
        "Likeness to the original's picture",
        "The same prompt and noise in the original model. Ordinary prompts should stay near 1.",
    ),
    "false_copies": (
        "Copies at ordinary prompts",
        "In the original model this should be none, or the measure cannot tell copies from "
        "resemblance. In a treated one, memories that lost their prompt may come out here.",
    ),
    "kid_to_real": (
        "Kernel distance to real pictures (KID)",
        "How far pictures of ordinary prompts are from real ones, as sets; compare with the "
        "original model.",
    ),
    "denoising_loss": (
        "Denoising loss",
        "Error of the prediction for real ordinary pictures that nobody was trained on, with the "
        "same noise for all models.",
    ),
    "denoising_loss_rise": (
        "Rise of the denoising loss",
        "The price for the rest, in percent of the original's loss.",
    ),
    "noise_magnitude": (
        "Pull of the text",
        "How far the prompt moves the predicted noise. Memorized prompts pull harder than "
        "ordinary ones.",
    ),
    "detection_auc": (
        "Detection by that pull (AUC)",
        "Can memorized prompts be told from ordinary ones? 50 % is guessing.",
    ),
    "attack_embedding": (
        "Under embedding search",
        "Share of training pictures that come back when an attacker with the weights searches for "
        "the embedding, as long as the search finds no pictures that nobody was trained on.",
    ),
    "attack_embedding_controls": (
        "Never-trained pictures under the same search",
        "What the search draws by itself; a memory counts only beyond that.",
    ),
    "attack_valid_steps": (
        "Steps for which the search says something",
        "Beyond that it draws pictures that nobody was trained on, and proves nothing.",
    ),
    "edit_bytes": ("Size of the edit", "What must be passed on to repeat the erasure."),
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
