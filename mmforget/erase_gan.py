"""Erase concepts from the generator of a GAN; what `mmforget.erase` does with an `ImageGAN`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmforget.concept import ConceptSpec, check_together
from mmforget.errors import ConfigurationError
from mmforget.method_names import check_settings, class_of, target_of

if TYPE_CHECKING:
    from mmforget.methods.base import ForgettingMethod
    from mmforget.methods.generator_editing import ClipSource
    from mmforget.models.gan import ImageGAN

METHODS: Mapping[str, str] = {
    "text-to-unlearn": "mmforget.methods.text_to_unlearn:TextToUnlearn",
    "anchor-distillation": "mmforget.methods.anchor_distillation:AnchorDistillation",
    "clip-direction": "mmforget.methods.clip_direction:ClipDirection",
    "clip-repulsion": "mmforget.methods.clip_repulsion:ClipRepulsion",
    "latent-negation": "mmforget.methods.latent_negation:LatentNegation",
    "unit-ablation": "mmforget.methods.unit_ablation:UnitAblation",
    "class-rerouting": "mmforget.methods.class_rerouting:ClassRerouting",
    "class-distillation": "mmforget.methods.class_distillation:ClassDistillation",
    "adapt-then-unlearn": "mmforget.methods.adapt_then_unlearn:AdaptThenUnlearn",
    "parameter-extrapolation": "mmforget.methods.parameter_extrapolation:ParameterExtrapolation",
    "identity-unlearning": "mmforget.methods.identity_unlearning:IdentityUnlearning",
}
"""Short name: ``module:class``. Others are given as a class or dotted path."""

DEFAULT = "text-to-unlearn"

ADVERSARIAL = ("adapt-then-unlearn", "parameter-extrapolation")
"""Methods that need the discriminator."""

SHIPPED = ("gan", "gan_conditional")
"""Generators that are shipped; the shipped CLIP model can guide and the shipped judge judge."""

CHECKPOINTS = (".pkl", ".pt", ".pth", ".bin", ".ckpt", ".safetensors")

STEPS = 300
"""Optimizer steps of the methods that train, unless the user says otherwise."""

GIVEN = ("model", "concepts", "guide", "alternatives", "copy", "seed")
"""Arguments of every method, which are no settings."""


@dataclass(frozen=True)
class GANErasure:
    """A finished erasure.

    Attributes:
        model: the unlearned generator, in eval mode.
        method: what was run.
        cost: ``seconds``, ``peak_memory_bytes``, ``sample_passes``.
    """

    model: ImageGAN
    method: ForgettingMethod
    cost: dict[str, Any]


def is_gan(source: str | Path) -> bool:
    """Whether a name, folder or file is a generator that `load_gan` reads; imports nothing."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.suffix in CHECKPOINTS
    if path.is_dir():
        return any((path / part / "generator.json").is_file() for part in (".", "artifact"))
    return str(source) in SHIPPED


def method_target(name: str) -> str:
    """``module:class`` of a method name; imports nothing.

    Raises:
        ConfigurationError: no such method; names the nearest.
    """
    return target_of(name, METHODS, ", which erases nothing from GANs")


def find_method(method: str | type[ForgettingMethod]) -> type[ForgettingMethod]:
    """Resolve a short name, class name, dotted path or class.

    Raises:
        ConfigurationError: there is no such method, or it does not erase concepts from GANs.
    """
    from mmforget.methods.base import ForgettingMethod
    from mmforget.models.base import HasLatents

    found: type[ForgettingMethod] = class_of(
        method, METHODS, method_target,
        lambda cls: issubclass(cls, ForgettingMethod) and HasLatents in cls.requires,
        "which erases nothing from GANs",
    )  # fmt: skip
    return found


def needs_guide(method: type[ForgettingMethod]) -> bool:
    """Whether a method cannot do without a CLIP model."""
    guide = inspect.signature(method).parameters.get("guide")
    return guide is not None and guide.default is inspect.Parameter.empty


def run_gan_erasure(
    generator: ImageGAN,
    concepts: Sequence[ConceptSpec],
    method: str | type[ForgettingMethod] = DEFAULT,
    guide: ClipSource | Sequence[ClipSource] | None = None,
    alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    seed: int = 0,
    copy: bool | Literal["auto"] = "auto",
    progress: bool = True,
) -> GANErasure:
    """Run a method on a generator.

    Args:
        generator: the generator.
        concepts: what to erase, at once.
        method: a key of `METHODS`, a class name, a dotted path or a class.
        guide: the CLIP model to follow, a folder or hub id of one, or several.
        alternatives: per target what else a picture could show, or a list for a single concept.
        settings: of the method.
        steps: of the optimizer, `STEPS` by default.
        seed: base of every random draw.
        copy: True edits a copy, False the generator itself, ``auto`` copies up to 1 GiB.
        progress: show a progress bar.

    Raises:
        ConfigurationError: an unknown method or setting, or no guide for a method that needs one.
        RequestError: contradictory concepts, or what the method refuses.
    """
    from mmforget.audit.cost import measured
    from mmforget.erase import run_method

    check_together(concepts)
    cls, settings = find_method(method), dict(settings or {})
    check_settings(cls, settings, GIVEN)
    if steps is not None and cls.view is None:
        raise ConfigurationError(
            f"`steps` is {steps}, but {cls.__name__} does not train; leave it out"
        )
    if guide is None and needs_guide(cls):
        raise ConfigurationError(
            f"{cls.__name__} needs a `guide`: a CLIP model, or a folder or hub id of one; "
            "'digit_world' is the one for the shipped generators"
        )
    known = inspect.signature(cls).parameters
    given = {"guide": guide, "alternatives": alternatives}
    given = {name: value for name, value in given.items() if name in known and value is not None}
    with measured() as cost:
        make: Any = cls
        instance = make(generator, list(concepts), copy=copy, seed=seed, **given, **settings)
        model: Any = run_method(instance, steps or STEPS, progress)
    passes = instance.cost()["sample_passes"]
    return GANErasure(model.eval(), instance, cost.to_dict() | {"sample_passes": passes})
