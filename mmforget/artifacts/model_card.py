"""The model card of an artifact: what was forgotten, how, with what evidence, and the limits."""

from __future__ import annotations

from collections.abc import Sequence

from mmforget.artifacts.manifest import Manifest
from mmforget.audit.results import Results
from mmforget.report import content, words
from mmforget.report.markdown import escape, metric_table, table
from mmforget.request import ForgetRequest

LIMITS = (
    "This is no certificate of deletion. The evidence is bounded by the attacks that were run.",
    "The base model and its copies are not changed; whoever has them has what was forgotten.",
)
CARD_ROLES = ("original", "unlearned", "retrained", "held_out", "control")


def model_card(
    manifest: Manifest,
    requests: Sequence[ForgetRequest],
    results: Results | None = None,
    library: str = "timm",
) -> str:
    """Write the card as Markdown with the front matter that Hugging Face reads.

    Samples are named by count and hash only, and the reasons of the requests are left out: a card
    that says whom a model has forgotten discloses it.

    Args:
        manifest: of the artifact.
        requests: everything that was forgotten, in order.
        results: the audit; without it the card says that nothing was measured.
        library: that loads the weights: ``timm``, ``torchvision``, ``transformers``, ``diffusers``,
            ``mmforget`` for generators of GANs.

    Returns:
        Text of ``README.md``.
    """
    import yaml

    tag, kind = "image-classification", "An image classifier"
    if library == "mmforget":
        tag, kind = "unconditional-image-generation", "A generator of a GAN"
    elif results is not None and words.is_detection(results):
        tag, kind = "object-detection", "An object detector"
    elif results is not None and words.is_multimodal(results):
        tag, kind = "image-text-to-text", "A multimodal language model"
    elif any(request.concepts for request in requests):
        tag, kind = "text-to-image", "A text-to-image model"
    front = {
        "library_name": library,
        "pipeline_tag": tag,
        "tags": ["machine-unlearning", "mmforget", manifest.method.lower()],
    }
    if results is not None:
        title = escape(results.title)
    else:
        title = escape(", ".join(request.name for request in requests))
    asked = [
        [request.name, content.request_text(request.to_dict(), results), request.goal]
        for request in requests
    ]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=True).strip() + "\n---",
        f"# {title}",
        f"{kind} that was made to forget, with {escape(manifest.method)} of mmforget. "
        f"Base model: {escape(manifest.base_model)}.",
        "## What was forgotten",
        table(["request", "what", "goal"], asked),
        "## Method",
        table(["setting", "value"], content.flatten(manifest.settings)),
        "## Evidence",
        *_evidence(results),
        "## Limits",
        "\n".join(f"- {escape(text)}" for text in (*LIMITS, *_open(results))),
        "## Files",
        "`manifest.json` holds where this comes from and the SHA-256 of every file.",
    ]
    return "\n\n".join(parts) + "\n"


def _evidence(results: Results | None) -> list[str]:
    if results is None:
        return ["Nothing was measured."]
    label = words.OUTCOMES[results.verdict.outcome][0]
    columns = [column for column in content.columns_of(results) if column.role in CARD_ROLES]
    groups = content.groups_of(
        columns,
        ("forgetting", "utility", "generation", "privacy", "representation", "relearning"),
    )
    return [
        f"**{label}.** {escape(results.verdict.sentence)}",
        escape(content.reading(results)),
        *(metric_table(columns, group) for group in groups),
    ]


def _open(results: Results | None) -> list[str]:
    if results is None:
        return []
    return [*(f"Not measured: {text}" for text in results.not_measured), *results.not_claimed]
