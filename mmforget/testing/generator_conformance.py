"""What every method that makes a GAN's generator forget must do, checked on real runs.

As `mmforget.testing.concept_conformance`, for generators that draw from latents. The mechanics run
on a tiny generator of random weights, in which the shipped CLIP model sees "white" pictures and
"pink" ones; whether the concept is gone and the rest stays is judged on the shipped generator::

    checks = GeneratorMethodChecks(MyMethod, tiny={"lr": 1e-3}, effective={"pool": 2048})
    checks.run_all()
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from mmforget.concept import ConceptSpec
from mmforget.errors import AccessError, ConfigurationError, MMForgetError, RequestError
from mmforget.methods.base import ForgettingMethod
from mmforget.metrics.judge import load_judge
from mmforget.models.base import Model, state_hash
from mmforget.models.clip import ClipModel, load_clip
from mmforget.models.gan import ImageGAN
from mmforget.models.gan_files import load_gan
from mmforget.testing.conformance import (
    MethodChecks,
    Run,
    _Poison,
    _require,
    _SaveAndKill,
    quiet_trainer,
)

TINY_CONCEPT, TINY_ALTERNATIVE = ConceptSpec("white"), "pink"
PICTURES = 500
"""Of the shipped generator, for the effect."""


def tiny_gan(classes: bool = False, discriminator: bool = False) -> ImageGAN:
    """A DCGAN of random weights; to the guide half its pictures are white, the others pink.

    Args:
        classes: with the classes "white" and "pink", whose pictures do not look like it.
        discriminator: with a discriminator of random weights.
    """
    shape = {"latent_size": 8, "channels": (16, 8, 8), "num_classes": 2 if classes else 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = (TINY_CONCEPT.target, TINY_ALTERNATIVE) if classes else ()
        model = ImageGAN("dcgan", shape, class_names=names)
        with torch.no_grad():
            # All pictures would be grey.
            model.network.to_image.weight.mul_(50)
            model.network.to_image.bias.add_(torch.tensor([0.35, -0.1, 0.1]))
            if classes:
                for norm in model.network.norms:
                    nn.init.normal_(norm.shift.weight)  # else all classes are the same
        if discriminator:
            model.discriminator = model.new_discriminator()
    return model.eval()


def tiny_settings(method: type[ForgettingMethod]) -> dict[str, Any]:
    """Settings of a short run on `tiny_gan`, as far as the method has them."""
    few = {
        "pool": 64, "bearing": 0.5, "clear": 0.5, "batch_size": 5, "retain_batch_size": 5,
        "lr": 1e-3, "mapper_steps": 2, "mapper_tries": 1, "samples": 8,
    }  # fmt: skip
    known = inspect.signature(method).parameters
    return {name: value for name, value in few.items() if name in known}


class GeneratorMethodChecks(MethodChecks):
    """The conformance checks of one method that works on `ImageGAN`.

    Args:
        method: the class, called with the model, a `ConceptSpec`, a CLIP model, `alternatives` and
            settings.
        tiny: settings for the mechanics, beside `tiny_settings`.
        effective: settings for the check of its effect.
        steps: optimizer steps of a run for the mechanics; at least 4.
        effect_steps: optimizer steps of the run whose effect is judged.
        target: what that run erases: a digit or an ink of the digit world.
        target_left: share of the original's rate that may be left of the target, in [0, 1].
        keep_at_least: share of the other pictures that must stay what they were to the judge, digit
            and ink each.
        model: makes the model for the mechanics.
        shipped: makes the model for the effect.
        guide: makes the guide.
    """

    def __init__(
        self,
        method: type[ForgettingMethod],
        tiny: Mapping[str, Any] | None = None,
        effective: Mapping[str, Any] | None = None,
        steps: int = 4,
        effect_steps: int = 150,
        target: str = "seven",
        target_left: float = 0.3,
        keep_at_least: float = 0.8,
        model: Callable[[], Model] = tiny_gan,
        shipped: Callable[[], Model] = lambda: load_gan("gan"),
        guide: Callable[[], ClipModel] = lambda: load_clip("digit_world"),
    ) -> None:
        super().__init__(
            self.made, model=model, forget_at_most=target_left, retain_drop=1 - keep_at_least,
            load=load_gan_unchecked,
        )  # fmt: skip
        self.method = method
        self.tiny = tiny_settings(method) | dict(tiny or {})
        self.effective = dict(effective or {})
        self.steps, self.effect_steps, self.target = steps, effect_steps, target
        self.make_shipped, self.make_guide = shipped, guide

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all checks."""
        return (*super().names(), "outside", "words")

    # ---- runs -----------------------------------------------------------------------------------

    @cached_property
    def guides(self) -> dict[torch.dtype, ClipModel]:
        """The guide in single and in double precision."""
        return {
            torch.float32: self.make_guide().float(),
            torch.float64: self.make_guide().double(),
        }

    def made(self, model: Model, **settings: Any) -> ForgettingMethod:
        """The method for the mechanics, with a guide of the model's precision."""
        guide: Any = self.guides[next(model.parameters()).dtype]
        return self._new(model, TINY_CONCEPT, guide, (TINY_ALTERNATIVE,), self.tiny | settings)

    def _new(
        self,
        model: Model,
        concept: ConceptSpec,
        guide: Any,
        alternatives: tuple[str, ...],
        settings: Mapping[str, Any],
    ) -> ForgettingMethod:
        make: Any = self.method
        found: ForgettingMethod = make(
            model, concept, guide, alternatives=list(alternatives), **settings
        )
        return found

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
        return _Poison("codes")

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
            f"{self.name} works from text, but declares that it reads data in `access`",
        )
        _require(
            run.method.view is None or run.method.cost()["sample_passes"] > 0,
            f"{self.name} trains, but counts no cost; call `spend`",
        )

    def check_processes(self) -> None:
        """Two processes give the weights of one, in double precision but for rounding."""
        single = self.make_model
        self.make_model = lambda: single().double()  # the original and the guide as well
        try:
            super().check_processes()
        finally:
            self.make_model = single

    def check_outside(self) -> None:
        """Parameters outside the chosen layers and all buffers keep their bits."""
        if "train_layers" not in self._settings:
            return
        model = self.make_model()
        groups: dict[str, list[str]] = model.layer_groups()  # type: ignore[operator]
        chosen = list(groups)[-1]
        method = self.made(model, train_layers=chosen)
        self.fit(method)
        before, after = model.network.state_dict(), method.finalize().network.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        _require(
            changed <= set(groups[chosen]),
            f"{self.name} with `train_layers='{chosen}'` also changes "
            f"{', '.join(sorted(changed - set(groups[chosen])))}",
        )
        _require(bool(changed), f"{self.name} with `train_layers='{chosen}'` changes nothing")

    def check_words(self) -> None:
        """Words that the guide cannot tell apart, or that nothing shows, are refused."""
        if not getattr(self.method, "needs_guide", True):
            return
        guide, settings = self.guides[torch.float32], self.tiny

        def made(*alternatives: str, **more: Any) -> ForgettingMethod:
            given = settings | more
            return self._new(self.make_model(), TINY_CONCEPT, guide, alternatives, given)

        def run(bearing: float) -> None:
            method = made(TINY_ALTERNATIVE, bearing=bearing)
            self.fit(method)
            method.finalize()

        what = "an alternative that is the concept itself"
        self._refused(RequestError, what, lambda: made(TINY_CONCEPT.target))
        if "bearing" in self._settings:
            what = "`clear` above `bearing`"
            few = {"bearing": 0.2, "clear": 0.4}
            self._refused(ConfigurationError, what, lambda: made(TINY_ALTERNATIVE, **few))
            self._refused(RequestError, "a concept that no picture shows", lambda: run(1 - 1e-9))

    @property
    def _settings(self) -> Mapping[str, Any]:
        return inspect.signature(self.method).parameters

    def _refused(self, kind: type[MMForgetError], what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except kind as error:
            _require("\n" not in str(error), f"{self.name} refuses {what} in more than one line")
        else:
            raise AssertionError(f"{self.name} accepts {what} instead of raising {kind.__name__}")

    @torch.no_grad()
    def check_effect(self) -> None:
        """Pictures of the target are gone, the other latents draw what they drew."""
        judge: Any = load_judge()
        factor = next(name for name in ("digit", "ink") if self.target in judge.factors[name])
        values = judge.factors[factor]
        others = tuple(value for value in values if value != self.target)
        given: Any = self.make_shipped()
        guide = self.guides[torch.float32]
        method = self._new(given, ConceptSpec(self.target), guide, others, self.effective)
        with torch.enable_grad():
            self.fit(method, max_steps=self.effect_steps)
        result: Any = method.finalize()
        _require(not method.no_op, f"{self.name} changed no parameter: it is a no-op")
        latents = given.draw(PICTURES, 1, purpose="-conformance")
        before, after = (judge(model.pictures(latents)) for model in (given, result))
        row = values.index(self.target)
        shown, shows = before[factor].argmax(1) == row, after[factor].argmax(1) == row
        first, last = float(shown.double().mean()), float(shows.double().mean())
        _require(
            last <= self.forget_at_most * first,
            f"{self.name} does not erase: the share of '{self.target}' went from {first:.3f} to "
            f"{last:.3f}, at most {self.forget_at_most:.2f} of it is accepted",
        )
        for name in ("digit", "ink"):
            same = before[name][~shown].argmax(1) == after[name][~shown].argmax(1)
            kept = float(same.double().mean())
            _require(
                kept >= 1 - self.retain_drop,
                f"{self.name} does not retain: only {kept:.2f} of the other latents draw the same "
                f"{name} as before, at least {1 - self.retain_drop:.2f} is accepted",
            )

    @torch.no_grad()
    def check_saving(self) -> None:
        """Parameter names are the original's, and a loaded folder draws the same pictures."""
        run: Run = self.plain
        given: Any = run.given
        result: Any = run.result
        _require(
            list(result.state_dict()) == list(given.state_dict()),
            f"{self.name} returns a model whose parameters are named otherwise than the original's",
        )
        with tempfile.TemporaryDirectory() as folder:
            result.save_native(Path(folder))
            loaded: Any = self.load(Path(folder))
        _require(
            state_hash(loaded.network) == state_hash(result.network),
            f"{self.name}: the loaded weights differ from those that were saved",
        )
        one, other = (m.generate([""], n=4, seed=0) for m in (result, loaded))
        _require(
            torch.equal(one, other),
            f"{self.name}: the loaded model draws other pictures than the saved one",
        )
        _require(
            not torch.equal(one, given.generate([""], n=4, seed=0)),
            f"{self.name}: the result draws the pictures of the original",
        )


def load_gan_unchecked(folder: Path) -> ImageGAN:
    """Load a generator that need not draw anything sensible."""
    return load_gan(folder, check=False)


def check_generator_method(method: type[ForgettingMethod], **settings: Any) -> None:
    """Make all checks of a method; see `GeneratorMethodChecks` for the arguments.

    Raises:
        AssertionError: the first check that fails, in one sentence.
    """
    GeneratorMethodChecks(method, **settings).run_all()
