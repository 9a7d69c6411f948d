"""What every method that erases named concepts must do, checked on real runs.

As `mmforget.testing.conformance`, for methods that read words instead of a data set. What concerns
the mechanics runs on a tiny pipeline of random weights; whether the concept is gone and the others
stay is judged on pictures of the shipped generator::

    checks = ConceptMethodChecks(lambda model, concepts: MyMethod(model, concepts, lr=1e-3))
    checks.run_all()
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from mmforget.concept import ConceptSpec
from mmforget.data.digit_captions import DIGIT_TEMPLATES, INK_TEMPLATES
from mmforget.errors import AccessError
from mmforget.methods.base import ForgettingMethod
from mmforget.metrics.judge import load_judge
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.testing.conformance import (
    MethodChecks,
    Run,
    _Poison,
    _require,
    _SaveAndKill,
    quiet_trainer,
)
from mmforget.testing.tiny_pipelines import tiny_pipeline

MakeConceptMethod = Callable[[Any, ConceptSpec], ForgettingMethod]

TINY_CONCEPT = ConceptSpec(
    "van gogh", synonyms=("church",), anchor="art", preserve=("monet", "a cat"), kind="style"
)


_ORIGINAL: dict[tuple[Callable[[], Any], int], dict[str, float]] = {}
"""What the shipped generator draws; it is the same for all methods."""


def tiny_generator() -> DiffusionGenerator:
    """A Stable Diffusion pipeline of random weights."""
    return DiffusionGenerator(tiny_pipeline("sd"), steps=4)


def shipped_generator() -> DiffusionGenerator:
    """The generator of the digit world, with a UNet."""
    folder = resources.files("mmforget") / "assets" / "digit_world" / "diffusion_unet"
    return load_generator(Path(str(folder)), steps=12, guidance=3.0)


class ConceptMethodChecks(MethodChecks):
    """The conformance checks of one method that erases concepts.

    Args:
        method: makes the method for a model and a concept. Called with `TINY_CONCEPT` on a tiny
            pipeline for the mechanics, where few sampling steps and records suffice.
        effect: makes the method for the check of its effect, on `shipped_generator`; default:
            `method`.
        steps: optimizer steps of a run for the mechanics; at least 4.
        effect_steps: optimizer steps of the run whose effect is judged.
        target: what that run erases, in the words of the digit world: a digit or an ink.
        target_at_most: share of pictures, in [0, 1], that may still show the target.
        retain_drop: share that the preserved digits and inks may lose, each on the average.
        pictures: per prompt, two prompts per word.
        model: makes the model for the mechanics.
        judge: reads the pictures; default: the shipped one.
    """

    def __init__(
        self,
        method: MakeConceptMethod,
        effect: MakeConceptMethod | None = None,
        steps: int = 6,
        effect_steps: int = 150,
        target: str = "seven",
        target_at_most: float = 0.2,
        retain_drop: float = 0.1,
        pictures: int = 4,
        model: Callable[[], DiffusionGenerator] = tiny_generator,
        judge: Callable[[], Any] = load_judge,
    ) -> None:
        super().__init__(
            lambda given: method(given, TINY_CONCEPT),
            model=model,
            forget_at_most=target_at_most,
            retain_drop=retain_drop,
            load=load_generator,
        )
        self.make_effective = effect or method
        self.steps, self.effect_steps = steps, effect_steps
        self.target, self.pictures, self.make_judge = target, pictures, judge

    # ---- runs -----------------------------------------------------------------------------------

    def fit(
        self, method: ForgettingMethod, checkpoint: Path | None = None, **settings: Any
    ) -> None:
        """Train if the method trains; there is no data."""
        if method.view is None:
            return
        quiet_trainer(**({"max_steps": self.steps} | settings)).fit(
            method, ckpt_path=checkpoint, weights_only=True
        )

    @property
    def exact(self) -> dict[str, Any]:
        """See `MethodChecks.exact`."""
        return {"precision": "64-true", "max_steps": 3}

    def killed(self, path: Path) -> Callback:
        """See `MethodChecks.killed`."""
        return _SaveAndKill(path, step=self.steps // 2)

    def poison(self) -> Callback:
        """See `MethodChecks.poison`."""
        return _Poison("noisy")

    @cached_property
    def erased(self) -> Run:
        """The run whose effect is judged."""
        model = shipped_generator()
        phrases = {
            word: template.format(word)
            for name, template in (("digit", "the digit {}"), ("ink", "a {} digit"))
            for word in self.make_judge().factors[name]
        }
        concept = ConceptSpec(
            self.target,
            synonyms=(phrases.pop(self.target),),
            # A particular one: pictures of just any digit would show the target now and then.
            anchor=phrases["three" if self.target != "three" else "two"],
            preserve=tuple(phrases.values()),
            templates=("{}",),
        )
        method = self.make_effective(model, concept)
        self.fit(method, max_steps=self.effect_steps)
        return Run(model, method, method.finalize())

    # ---- checks ---------------------------------------------------------------------------------

    def check_access(self) -> None:
        """It runs without any data, and counts its cost if it trains."""
        try:
            run = self.plain
        except (AccessError, KeyError) as error:
            raise AssertionError(f"{self.name} reads data, though it has words only") from error
        access = run.method.access
        _require(
            not access.forget_inputs and access.retain == "none",
            f"{self.name} erases named concepts, but declares that it reads data in `access`",
        )
        _require(
            run.method.view is None or run.method.cost()["sample_passes"] > 0,
            f"{self.name} trains, but counts no cost; call `spend`",
        )

    def rates(self, model: Any) -> dict[str, float]:
        """Share of the pictures for each digit and ink that the judge reads as what was asked."""
        judge, found = self.make_judge(), {}
        for name, templates in (("digit", DIGIT_TEMPLATES[:2]), ("ink", INK_TEMPLATES[1:3])):
            words: Sequence[str] = judge.factors[name]
            prompts = [template.format(word) for word in words for template in templates]
            read = judge(model.generate(prompts, n=self.pictures, seed=1))[name].argmax(1)
            for number, row in enumerate(read.view(len(words), -1)):
                found[words[number]] = float((row == number).double().mean())
        return found

    def check_effect(self) -> None:
        """Pictures of the target are gone, those of every other factor stay."""
        given, method, result = self.erased
        changed = state_hash(given) != state_hash(result)
        _require(
            changed == method.edits_weights,
            f"{self.name} {'changed' if changed else 'did not change'} weights, but declares "
            f"`edits_weights={method.edits_weights}`",
        )
        _require(
            method.no_op == (method.edits_weights and not changed),
            f"{self.name} reports `no_op={method.no_op}`",
        )
        key = (self.make_judge, self.pictures)
        if key not in _ORIGINAL:
            _ORIGINAL[key] = self.rates(given)
        before, after = _ORIGINAL[key], self.rates(result)
        _require(
            before[self.target] > self.forget_at_most + 0.3,
            f"the original draws '{self.target}' in only {before[self.target]:.2f} of its "
            "pictures, so that forgetting cannot be seen; train it better",
        )
        _require(
            after[self.target] <= self.forget_at_most,
            f"{self.name} does not erase: the share of '{self.target}' went from "
            f"{before[self.target]:.2f} to {after[self.target]:.2f}, at most "
            f"{self.forget_at_most:.2f} is accepted",
        )
        factors = self.make_judge().factors
        for name in ("digit", "ink"):
            kept = [word for word in factors[name] if word != self.target]
            one, other = (
                sum(rates[word] for word in kept) / len(kept) for rates in (before, after)
            )
            _require(
                other >= one - self.retain_drop,
                f"{self.name} does not retain: the share of the other {name}s went from {one:.2f} "
                f"to {other:.2f}",
            )

    @torch.no_grad()
    def check_saving(self) -> None:
        """Parameter names are the original's, and a loaded folder draws the same pictures."""
        run = self.plain
        given: Any = run.given
        result: Any = run.result
        _require(
            list(run.result.state_dict()) == list(run.given.state_dict()),
            f"{self.name} returns a model whose parameters are named otherwise than the original's",
        )
        prompts = ["van gogh", "a cat"]
        with tempfile.TemporaryDirectory() as folder:
            run.result.save_native(Path(folder))
            loaded: Any = self.load(Path(folder))
        _require(
            state_hash(loaded) == state_hash(run.result),
            f"{self.name}: the loaded weights differ from those that were saved",
        )
        one, other = (m.generate(prompts, n=1, seed=0, steps=12) for m in (result, loaded))
        _require(
            torch.equal(one, other),
            f"{self.name}: the loaded model draws other pictures than the saved one",
        )
        plain = given.generate(prompts, n=1, seed=0, steps=12)
        _require(
            not torch.equal(one, plain),
            f"{self.name}: the result draws the pictures of the original",
        )


def check_concept_method(method: MakeConceptMethod, **settings: Any) -> None:
    """Make all checks of a method; see `ConceptMethodChecks` for the arguments.

    Raises:
        AssertionError: the first check that fails, in one sentence.
    """
    ConceptMethodChecks(method, **settings).run_all()
