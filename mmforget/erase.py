"""Erase concepts from a text-to-image model, or the generator of a GAN, with one call."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from mmforget.concept import ConceptKind, ConceptSpec, check_together
from mmforget.errors import ConfigurationError, RequestError
from mmforget.method_names import check_settings, class_of, target_of

if TYPE_CHECKING:
    from mmforget.methods.base import ForgettingMethod
    from mmforget.methods.text_guided import ConceptMethod
    from mmforget.models.diffusion import DiffusionGenerator

METHODS: Mapping[str, str] = {
    "uce": "mmforget.methods.uce:UCE",
    "rece": "mmforget.methods.rece:RECE",
    "esd": "mmforget.methods.esd:ESD",
    "concept-ablation": "mmforget.methods.concept_ablation:ConceptAblation",
    "salun": "mmforget.methods.concept_salun:ConceptSalUn",
    "sld": "mmforget.methods.sld:SLD",
}
"""Short name: ``module:class``. Any other `ConceptMethod` is given as a class or dotted path."""

GIVEN = ("model", "concepts", "memorized", "copy", "seed")
"""Arguments of every method, which are no settings."""

STEPS = 200
"""Optimizer steps of the methods that train, unless the user says otherwise."""

CHECKPOINTS = 10
"""How often a training that can be resumed writes down its state."""


@dataclass(frozen=True)
class Erasure:
    """A finished erasure.

    Attributes:
        model: the unlearned generator, in eval mode.
        methods: what was run, in order; one, unless concepts were erased one after another.
        cost: ``seconds``, ``peak_memory_bytes``, ``sample_passes``.
    """

    model: DiffusionGenerator
    methods: tuple[ConceptMethod, ...]
    cost: dict[str, Any]


def erase(
    pipeline: Any,
    concept: str | ConceptSpec | Sequence[str | ConceptSpec],
    method: str | type[ForgettingMethod] | None = None,
    *,
    preserve: Sequence[str] = (),
    synonyms: Sequence[str] = (),
    anchor: str | None = None,
    kind: ConceptKind = "object",
    templates: Sequence[str] = (),
    sequence: bool = False,
    steps: int | None = None,
    sampling_steps: int | None = None,
    seed: int = 0,
    copy: bool | Literal["auto"] = "auto",
    progress: bool = True,
    guide: Any = None,
    alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    **settings: Any,
) -> Any:
    """Make a text-to-image pipeline, or the generator of a GAN, forget concepts.

    Args:
        pipeline: a diffusers pipeline, a `DiffusionGenerator`, a local folder or a hub id; or an
            `ImageGAN`, or what `load_gan` reads: ``gan``, ``gan_conditional``, a folder or a file.
        concept: what to erase: words, a `ConceptSpec`, or a list of either.
        method: ``uce``, ``rece``, ``esd``, ``concept-ablation``, ``salun``, ``auto`` (see
            `automatic`), a class name, a dotted path or a class; None takes ``uce``. For GANs one
            of `mmforget.erase_gan.METHODS`; None takes ``text-to-unlearn``.
        preserve: concepts that must stay.
        synonyms: other words for the concept, if there is one.
        anchor: what the concept becomes (see `ConceptSpec`). Like `preserve`, `kind` and
            `templates`, it is for all concepts that are given as words.
        kind: kind of the concept.
        templates: sentences in which it is erased.
        sequence: erase the concepts one after another instead of all at once.
        steps: optimizer steps of a method that trains, by default 200, and 300 for GANs.
        sampling_steps: steps of the sampler where a method makes pictures, its setting ``steps``.
        seed: base of every random draw.
        copy: True edits a copy, False the pipeline itself, ``auto`` copies up to 1 GiB.
        progress: show a progress bar while training.
        guide: for GANs, the CLIP model to follow, or a folder or hub id of one.
        alternatives: for GANs, what else a picture could show: a list for a single concept, or one
            per target.
        settings: further settings of the method, such as ``weights="self"`` for ESD.

    Returns:
        A diffusers pipeline, or an `ImageGAN`: a new one if a copy was taken, else the one that was
        given.

    Raises:
        RequestError: contradictory concepts, or words that the text encoder would truncate.
        ConfigurationError: an unknown method or setting, or the method SLD, which is guidance and
            no change of weights: no diffusers pipeline can carry it.
        ModelError, CapabilityError: a pipeline that is not supported.

    Example:
        >>> edited = erase(pipe, "Van Gogh", kind="style", preserve=["Monet"])  # doctest: +SKIP
    """
    concepts = as_concepts(concept, preserve, synonyms, anchor, kind, templates)
    gan = _as_gan(pipeline)
    if gan is not None:
        from mmforget.erase_gan import DEFAULT, run_gan_erasure

        if sequence or sampling_steps is not None:
            raise ConfigurationError(
                "`sequence` and `sampling_steps` are for pipelines, but this is the generator of a "
                "GAN; leave them out"
            )
        return run_gan_erasure(
            gan, concepts, method or DEFAULT, guide, alternatives, settings, steps, seed,
            copy if gan is pipeline else False, progress,
        ).model  # fmt: skip
    if guide is not None or alternatives is not None:
        raise ConfigurationError(
            "`guide` and `alternatives` are for generators of GANs, but this is a pipeline; leave "
            "them out"
        )
    method = method or "uce"
    if method == "sld" or getattr(method, "__name__", method) == "SLD":
        raise ConfigurationError(
            "`method` is 'sld', which is guidance and changes no weights, so that no diffusers "
            "pipeline can carry it; use `mmforget.SLD(mmforget.load_generator(...), concepts)"
            ".finalize()` and its `generate`"
        )
    from mmforget.models.diffusion import DiffusionGenerator, load_generator

    if isinstance(pipeline, str | Path):
        generator, copy = load_generator(pipeline), False
    elif isinstance(pipeline, DiffusionGenerator):
        generator = pipeline
    else:
        generator = DiffusionGenerator(pipeline)
    if sampling_steps is not None:
        settings["steps"] = sampling_steps
    done = run_erasure(generator, concepts, method, settings, sequence, steps, seed, copy, progress)
    return done.model.pipeline


def _as_gan(source: Any) -> Any:
    """The generator of a GAN that was given or named; None for anything else."""
    from mmforget.erase_gan import is_gan

    if isinstance(source, str | Path):
        if not is_gan(source):
            return None
        from mmforget.models.gan_files import load_gan

        return load_gan(source)
    from mmforget.models.gan import ImageGAN

    return source if isinstance(source, ImageGAN) else None


def as_concepts(
    concept: str | ConceptSpec | Sequence[str | ConceptSpec],
    preserve: Sequence[str] = (),
    synonyms: Sequence[str] = (),
    anchor: str | None = None,
    kind: ConceptKind = "object",
    templates: Sequence[str] = (),
) -> tuple[ConceptSpec, ...]:
    """Make concepts of words; what is a `ConceptSpec` already stays as it is.

    Raises:
        RequestError: synonyms for several concepts, settings beside a complete specification, or
            concepts that contradict each other.
    """
    for name, value in (("preserve", preserve), ("synonyms", synonyms), ("templates", templates)):
        if isinstance(value, str):
            raise RequestError(f"`{name}` is the text '{value}', it must be a list of texts")
    given = [concept] if isinstance(concept, str | ConceptSpec) else list(concept)
    words = [one for one in given if isinstance(one, str)]
    if synonyms and len(words) != 1:
        raise RequestError(
            f"`synonyms` were given for {len(words)} concepts named by words, so that it is "
            "unclear whose they are; give each concept as ConceptSpec(target, synonyms=...)"
        )
    shared = {"preserve": preserve, "anchor": anchor, "templates": templates}
    named = [name for name, value in shared.items() if value]
    if named and not words and given:
        raise RequestError(
            f"`{named[0]}` was given beside a ConceptSpec, which has its own; set it there"
        )
    specs = tuple(
        ConceptSpec(one, tuple(synonyms), kind, anchor, tuple(preserve), tuple(templates))
        if isinstance(one, str)
        else one
        for one in given
    )
    check_together(specs)
    return specs


def find_method(method: str | type[ForgettingMethod]) -> type[ConceptMethod]:
    """Resolve a short name, class name, dotted path or class.

    Raises:
        ConfigurationError: there is no such method, or it does not erase concepts.
    """
    from mmforget.methods.text_guided import ConceptMethod

    found: type[ConceptMethod] = class_of(
        method, METHODS, method_target, lambda cls: issubclass(cls, ConceptMethod),
        "which erases no concepts",
    )  # fmt: skip
    return found


def method_target(name: str) -> str:
    """``module:class`` of a method name; imports nothing.

    Raises:
        ConfigurationError: no such method; names the nearest.
    """
    return target_of(name, METHODS, others=["auto"])


def automatic(generator: DiffusionGenerator, concepts: Sequence[ConceptSpec]) -> str:
    """The method ``auto`` stands for: by family and kind, without any measurement.

    Unsafe content needs a method that reaches beyond the prompt's own layers; transformers with
    joint attention mix text and picture, so that editing their few text projections leaves much.
    """
    if any(concept.kind == "unsafe" for concept in concepts) or generator.kind in ("sd3", "flux"):
        return "esd"
    return "uce"


def run_erasure(
    generator: DiffusionGenerator,
    concepts: Sequence[ConceptSpec],
    method: str | type[ForgettingMethod] = "uce",
    settings: Mapping[str, Any] | None = None,
    sequence: bool = False,
    steps: int | None = None,
    seed: int = 0,
    copy: bool | Literal["auto"] = "auto",
    progress: bool = True,
) -> Erasure:
    """Run a method on concepts, all at once or one after another.

    Args:
        generator: the model.
        concepts: what to erase.
        method: see `erase`.
        settings: of the method.
        sequence: see `erase`.
        steps: see `erase`.
        seed: see `erase`.
        copy: see `erase`.
        progress: see `erase`.

    Raises:
        MMForgetError: see `erase`.
    """
    from mmforget.audit.cost import measured

    check_together(concepts)
    cls = find_method(automatic(generator, concepts) if method == "auto" else method)
    settings = dict(settings or {})
    check_settings(cls, settings, GIVEN)
    if steps is not None and cls.view is None:
        raise ConfigurationError(
            f"`steps` is {steps}, but {cls.__name__} does not train; leave it out"
        )
    parts = [[concept] for concept in concepts] if sequence else [list(concepts)]
    model, state, done = generator, {}, []  # type: ignore[var-annotated]
    with measured() as cost:
        for number, part in enumerate(parts):
            # After the first request the model is ours already.
            instance = cls(model, part, copy=copy if number == 0 else False, seed=seed, **settings)
            instance.inherit(state)
            model = run_method(instance, steps, progress)
            state = instance.carry()
            done.append(instance)
    passes = sum(one.cost()["sample_passes"] for one in done)
    return Erasure(model, tuple(done), cost.to_dict() | {"sample_passes": passes})


def run_method(
    method: ForgettingMethod,
    steps: int | None = None,
    progress: bool = True,
    checkpoints: Path | None = None,
    **trainer: Any,
) -> DiffusionGenerator:
    """Train a method if it trains, and finalize it.

    Args:
        method: a method that brings its own data.
        steps: optimizer steps.
        progress: show a progress bar.
        checkpoints: folder in which a training that is stopped leaves its state, and from which it
            goes on; None keeps none.
        trainer: further settings of Lightning's trainer.

    Raises:
        ConfigurationError: fewer than one step.
        DivergenceError: the training did not stay finite.
    """
    if method.view is None:
        return method.finalize()  # type: ignore[return-value]
    steps = STEPS if steps is None else steps
    if steps < 1:
        raise ConfigurationError(f"`steps` is {steps}, it must be at least 1")
    from lightning.pytorch import Trainer

    device = next(method.model.network.parameters()).device
    where: dict[str, Any] = {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
    }
    plain: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": progress,
        "limit_val_batches": 0,
    }
    last = None
    if checkpoints is not None:
        from lightning.pytorch.callbacks import ModelCheckpoint

        keep = ModelCheckpoint(
            checkpoints, save_last=True, every_n_train_steps=max(1, steps // CHECKPOINTS)
        )
        plain |= {"enable_checkpointing": True, "callbacks": [keep]}
        last = checkpoints / "last.ckpt"
    with quiet():
        running = Trainer(**(plain | where | trainer))
        running.fit(method, ckpt_path=last if last is not None and last.is_file() else None)
        if last is not None:
            running.save_checkpoint(last)
    model: DiffusionGenerator = method.finalize()  # type: ignore[assignment]
    return model.to(device)  # Lightning leaves it on the CPU


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's remarks on hardware, loaders and tips; its warnings on training stay."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*GPU available but not used.*")
            warnings.filterwarnings("ignore", ".*in eval mode.*")
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # after a resume
            warnings.filterwarnings("ignore", ".*`IterableDataset` has `__len__`.*")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


class _Callable(ModuleType):
    """A module that does, when it is called, what its function of the same name does.

    Once it is imported, Python sets ``mmforget.erase`` to the module and not to the function.
    """

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return erase(*args, **settings)


sys.modules[__name__].__class__ = _Callable
