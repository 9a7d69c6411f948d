"""What there is, as one static table: names, where they are, one line each. Imports no torch.

This is the only registry of mmforget, and only for `mmforget list`, for short class names and for
suggestions: a class that is not in it works by its dotted path. A test compares it with the
classes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One thing that can be listed.

    Args:
        target: ``module:name``.
        summary: one line.
        paper: where it was published, empty for our own.
        capabilities: what a method needs of a model, or what a model offers.
        reads: the retain data that a method reads, its `DataAccess.retain`.
    """

    target: str
    summary: str
    paper: str = ""
    capabilities: tuple[str, ...] = ()
    reads: str = ""

    @property
    def name(self) -> str:
        """Class or function name, which is also the short name in configurations."""
        return self.target.partition(":")[2]


_FEATURES = ("HasLoss", "HasLogits", "HasFeatures", "HasHead", "Sites")

MODELS = (
    Entry(
        "mmforget.models.classifier:ImageClassifier",
        "image classifiers of timm, torchvision and transformers, or any network of yours",
        capabilities=_FEATURES,
    ),
)

DATA = (
    Entry("mmforget.data.digit_world:DigitWorld", "real handwritten digits in colour, built in"),
    Entry("mmforget.data.cifar:CIFAR10", "CIFAR-10: 60,000 photos in 10 classes"),
    Entry("mmforget.data.cifar:CIFAR100", "CIFAR-100: 60,000 photos in 100 classes"),
    Entry("mmforget.data.torchvision_data:TorchvisionData", "any data set of torchvision"),
    Entry("mmforget.data.image_folder:ImageFolderData", "a folder with one folder per class"),
    Entry("mmforget.data.huggingface:HuggingFaceData", "a data set of the hub or local files"),
)

METHODS = (
    Entry(
        "mmforget.methods.gs_lora:GSLoRA",
        "bounded forgetting in group-sparse adapters of the feed-forward layers",
        "CVPR 2024, arXiv 2403.11530",
        ("HasLoss", "HasLogits", "HasHead", "Sites"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.gs_lora_plus_plus:GSLoRAPlusPlus",
        "GSLoRA with prototypes, also for few samples and missing classes",
        "T-PAMI 2026, arXiv 2501.09705",
        ("HasLoss", "HasLogits", "HasHead", "Sites", "HasFeatures"),
        "full",
    ),
    Entry(
        "mmforget.methods.ssd:SSD",
        "dampen the weights that matter more to the forget set than to the rest",
        "AAAI 2024, arXiv 2308.07707",
        (),
        "statistics",
    ),
    Entry(
        "mmforget.methods.neg_grad_plus:NegGradPlus",
        "descend on the retain loss, ascend on the forget loss",
        "NeurIPS 2023, arXiv 2302.09880",
        ("HasLoss",),
        "full",
    ),
    Entry(
        "mmforget.methods.random_labels:RandomLabels",
        "train the forget set on wrong labels and the rest on its own",
        "AAAI 2021, arXiv 2010.10981",
        ("HasLoss", "HasLogits"),
        "full",
    ),
    Entry(
        "mmforget.methods.scrub:SCRUB",
        "away from the original model on the forget set, close to it on the rest",
        "NeurIPS 2023, arXiv 2302.09880",
        ("HasLogits",),
        "full",
    ),
    Entry(
        "mmforget.methods.salun:SalUn",
        "random labels on the most salient weights, all others strictly frozen",
        "ICLR 2024, arXiv 2310.12508",
        ("HasLoss", "HasLogits"),
        "full",
    ),
    Entry(
        "mmforget.methods.retrain:Retrain",
        "the oracle: train again from fresh weights without the forget set",
        "",
        ("HasLoss",),
        "full",
    ),
    Entry("mmforget.methods.identity:Identity", "control: changes nothing", "", (), "none"),
    Entry(
        "mmforget.methods.logit_mask:LogitMask",
        "control: hides the forgotten outputs",
        "",
        ("HasLogits", "HasHead"),
        "none",
    ),
    Entry(
        "mmforget.methods.head_only:HeadOnly",
        "control: edits the head and leaves the features as they are",
        "",
        ("HasLoss", "HasLogits", "HasFeatures", "HasHead"),
        "full",
    ),
)

METRICS = (
    Entry("mmforget.metrics.output:ClassAccuracy", "accuracy of each class"),
    Entry("mmforget.metrics.output:JSDivergence", "distance of the predictions to a reference"),
    Entry("mmforget.metrics.output:KLFromReference", "divergence of the predictions, in nats"),
    Entry("mmforget.metrics.output:ActivationDistance", "Euclidean distance of the probabilities"),
    Entry("mmforget.metrics.output:Agreement", "share of equal predictions of two models"),
    Entry("mmforget.metrics.output:ZRF", "likeness of the predictions to a random network's"),
    Entry("mmforget.metrics.representation:LinearCKA", "unbiased likeness of two representations"),
    Entry("mmforget.metrics.representation:KNNAccuracy", "accuracy of the nearest neighbours"),
    Entry("mmforget.metrics.membership:MembershipAUC", "can members be told from others?"),
    Entry("mmforget.metrics.summary:h_mean", "harmonic mean of what was kept and what was lost"),
    Entry("mmforget.metrics.summary:tug_of_war", "closeness to the retrained model on all splits"),
    Entry("mmforget.metrics.summary:average_gap", "mean difference to the retrained model"),
)

ATTACKS = (
    Entry("mmforget.attacks.relearning:relearn", "how fast a few samples bring the class back"),
    Entry("mmforget.attacks.probe:linear_probe", "is the class still in the features?"),
    Entry("mmforget.attacks.membership:transfer", "membership, learned on data that is known"),
)

CATALOGUE: dict[str, tuple[Entry, ...]] = {
    "models": MODELS,
    "data": DATA,
    "methods": METHODS,
    "metrics": METRICS,
    "attacks": ATTACKS,
}


def fits(method: Entry, model: Entry) -> bool:
    """Whether the model offers everything that the method needs."""
    return set(method.capabilities) <= set(model.capabilities)
