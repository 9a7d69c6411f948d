"""What every forgetting method and every model family must do, checked on real runs.

Nothing here needs pytest. For a method of your own::

    from mmforget.testing.conformance import check_method

    check_method(lambda model: MyMethod(model, lr=1e-3))

A check that fails raises `AssertionError` with one sentence. In pytest, take
one test per check::

    @pytest.mark.parametrize("name", MethodChecks.names())
    def test_my_method(name, checks):     # checks = MethodChecks(...), made once
        checks.run(name)
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from mmforget.data.base import ForgetDataModule, ImageDataset
from mmforget.errors import (
    AccessError,
    CapabilityError,
    DivergenceError,
    MMForgetError,
    RequestError,
)
from mmforget.methods.base import ForgettingMethod, StatisticsMethod
from mmforget.models.base import (
    Batch,
    Generates,
    HasFeatures,
    HasHead,
    HasLogits,
    HasLoss,
    Model,
    SiteKind,
    Sites,
    TextConditioned,
    state_hash,
)
from mmforget.models.classifier import load_classifier
from mmforget.request import ForgetRequest
from mmforget.testing.patterns import PatternData, pattern_model

MakeMethod = Callable[[Model], ForgettingMethod]


class Run(NamedTuple):
    """One complete run of a method.

    Attributes:
        given: the model that the method received.
        method: the method, after `finalize`.
        result: the unlearned model.
    """

    given: Model
    method: ForgettingMethod
    result: Model


def pattern_data() -> ForgetDataModule:
    """`PatternData` with a request for one of its five classes."""
    data = PatternData()
    data.request(ForgetRequest(classes=("basalt",)))
    return data


class MethodChecks:
    """The conformance checks of one method, to be run one by one or all at once.

    Args:
        method: makes the method for a model, with settings that forget within `epochs` epochs.
        model: makes a trained model, equal at every call; default: `pattern_model`.
        data: makes the data with its request, equal at every call; default: `pattern_data`.
        epochs: length of a run; at least 2, so that it can be interrupted between two epochs.
            Methods that make a single pass use 1.
        forget_at_most: accuracy in [0, 1] that may be left on the forget part of the test set.
        retain_drop: accuracy in [0, 1] that may be lost on the retain part of the test set.
        load: loads what `save_native` wrote.
    """

    def __init__(
        self,
        method: MakeMethod,
        model: Callable[[], Model] = pattern_model,
        data: Callable[[], ForgetDataModule] = pattern_data,
        epochs: int = 2,
        forget_at_most: float = 0.35,
        retain_drop: float = 0.1,
        load: Callable[[Path], Model] = load_classifier,
    ) -> None:
        self.make, self.make_model, self.make_data = method, model, data
        self.epochs = epochs
        self.forget_at_most, self.retain_drop = forget_at_most, retain_drop
        self.load = load

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all checks, in the order in which `run_all` makes them."""
        return (
            "capabilities",
            "given_model",
            "determinism",
            "access",
            "effect",
            "saving",
            "resume",
            "processes",
            "divergence",
        )

    def run(self, name: str) -> None:
        """Make one check.

        Raises:
            AssertionError: it fails; the message is one sentence.
        """
        getattr(self, f"check_{name}")()

    def run_all(self) -> None:
        """Make all checks; the first failure ends it."""
        for name in self.names():
            self.run(name)

    # ---- runs -----------------------------------------------------------------------------------

    @cached_property
    def name(self) -> str:
        """Class name of the method."""
        return type(self.make(self.make_model())).__name__

    @cached_property
    def plain(self) -> Run:
        """An ordinary run, shared by the checks."""
        return self.forget(self.make_model())

    def forget(self, model: Model, **settings: Any) -> Run:
        """Run the method on a model, with further settings of the trainer."""
        method = self.make(model)
        self.fit(method, **settings)
        return Run(model, method, method.finalize())

    def fit(
        self,
        method: ForgettingMethod,
        checkpoint: Path | None = None,
        **settings: Any,
    ) -> None:
        """Connect data that refuses undeclared access, and train if the method trains."""
        data = self.make_data().restricted(method.access)
        method.bind(data)
        if method.view is None:
            return
        data.view = method.view
        epochs = 1 if isinstance(method, StatisticsMethod) else self.epochs
        quiet_trainer(**({"max_epochs": epochs} | settings)).fit(
            method, datamodule=data, ckpt_path=checkpoint, weights_only=True
        )

    def batch(self, role: Literal["forget", "retain"]) -> dict[str, Tensor]:
        """All test samples of a role."""
        return whole(self.make_data().subset("test", role))

    # ---- for subclasses -------------------------------------------------------------------------

    @property
    def exact(self) -> dict[str, Any]:
        """Trainer settings of a run whose result does not depend on the number of processes.

        It holds every kind of step, and batches that must be padded.
        """
        return {"precision": "64-true", "max_epochs": 1}

    def killed(self, path: Path) -> Callback:
        """Saves a checkpoint when about half of a run is done, and ends the run soon after."""
        return _SaveAndKill(path)

    def poison(self) -> Callback:
        """Makes the input of the second batch NaN."""
        return _Poison("image")

    # ---- checks ---------------------------------------------------------------------------------

    def check_capabilities(self) -> None:
        """A model that offers nothing is refused, in one sentence, before any work."""
        needs = type(self.make(self.make_model())).requires
        try:
            self.make(_Bare())
        except CapabilityError as error:
            text = str(error)
            _require(
                all(word in text for word in (self.name, *(need.__name__ for need in needs))),
                f"{self.name} refuses a model without naming itself and what is missing: {text}",
            )
            _require("\n" not in text, f"{self.name} refuses a model in more than one line")
        except MMForgetError as error:
            raise AssertionError(
                f"{self.name} refuses a bare model with {type(error).__name__} instead of "
                f"CapabilityError: {error}"
            ) from error
        except Exception as error:
            raise AssertionError(
                f"{self.name} fails on a bare model with {type(error).__name__} ({error}); declare "
                "what it needs in `requires`"
            ) from error
        else:
            _require(not needs, f"{self.name} accepts a model without what it `requires`")

    def check_given_model(self) -> None:
        """The given model keeps its bits, flags and mode, and can be had back."""
        model = self.make_model()
        before, grads = state_hash(model), [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        method = self.make(model)
        _require(
            method.copied,
            f"{self.name} edits a small model in place; `copy='auto'` must take a copy",
        )
        self.fit(method)
        _require(state_hash(model) == before, f"{self.name} changes the given model in training")
        result = method.finalize()
        _require(state_hash(model) == before, f"{self.name} changes the given model in `finalize`")
        _require(
            grads == [p.requires_grad for p in model.parameters()],
            f"{self.name} changes `requires_grad` of the given model",
        )
        _require(
            modes == [m.training for m in model.modules()],
            f"{self.name} changes the train or eval mode of the given model",
        )
        _require(result is not model, f"{self.name} returns the given model instead of its copy")
        _require(method.restore() is model, f"{self.name} does not give the given model back")
        _require(
            grads == [p.requires_grad for p in result.parameters()],
            f"{self.name} leaves other parameters frozen in the result than in the given model",
        )
        _require(
            not any(m.training for m in result.modules()),
            f"{self.name} returns a model that is not in eval mode",
        )

    def check_determinism(self) -> None:
        """The same seed gives the same bits, whatever the global generator was before."""
        torch.manual_seed(1234)
        again = self.forget(self.make_model())
        _require(
            state_hash(again.result) == state_hash(self.plain.result),
            f"{self.name} gives different weights with the same seed; draw random numbers from "
            "`mmforget.seeds.generator`",
        )

    def check_access(self) -> None:
        """It runs with nothing but the data that it declares; batches then lack other labels."""
        try:
            run = self.plain
        except (AccessError, KeyError) as error:
            raise AssertionError(
                f"{self.name} reads data that it does not declare in `access`: {error}"
            ) from error
        cost = run.method.cost()
        access = run.method.access
        _require(
            access.forget_inputs or cost["forget_sample_passes"] == 0,
            f"{self.name} counts passes over the forget set, but declares `forget_inputs=False`",
        )
        _require(
            access.retain != "none" or cost["retain_sample_passes"] == 0,
            f"{self.name} counts passes over the retain set, but declares `retain='none'`",
        )
        _require(
            run.method.view is None or cost["sample_passes"] > 0,
            f"{self.name} trains, but counts no cost; call `spend`",
        )

    @torch.no_grad()
    def check_effect(self) -> None:
        """It forgets and retains, compared with the original, or is a control that says so."""
        given, method, result = self.plain
        changed = state_hash(given) != state_hash(result)
        _require(
            method.no_op == (not changed),
            f"{self.name} {'changed' if changed else 'did not change'} the model, but reports "
            f"`no_op={method.no_op}`",
        )
        if not method.expects_change:
            _require(not changed, f"{self.name} declares `expects_change=False`, but changes")
            _require(method.control, f"{self.name} changes nothing, so it must be a `control`")
            return
        _require(changed, f"{self.name} changed no parameter: it is a no-op")
        before = {role: accuracy(given, self.batch(role)) for role in ("forget", "retain")}
        after = {role: accuracy(result, self.batch(role)) for role in ("forget", "retain")}
        _require(
            before["forget"] > self.forget_at_most + 0.3,
            f"the original knows only {before['forget']:.2f} of the forget set, so that forgetting "
            "cannot be seen; train it better",
        )
        _require(
            after["forget"] <= self.forget_at_most,
            f"{self.name} does not forget: accuracy on the forget set went from "
            f"{before['forget']:.2f} to {after['forget']:.2f}, at most {self.forget_at_most:.2f} "
            "is accepted",
        )
        _require(
            after["retain"] >= before["retain"] - self.retain_drop,
            f"{self.name} does not retain: accuracy on the retain set went from "
            f"{before['retain']:.2f} to {after['retain']:.2f}",
        )

    @torch.no_grad()
    def check_saving(self) -> None:
        """The result has the original's parameter names, and native weights give its outputs."""
        run = self.plain
        _require(
            list(run.result.state_dict()) == list(run.given.state_dict()),
            f"{self.name} returns a model whose parameters are named otherwise than the original's",
        )
        check_saved(run.result, self.batch("retain"), self.load, self.name)

    def check_resume(self) -> None:
        """A run that is killed and resumed ends with the bits of an unbroken one."""
        if self.plain.method.view is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "epoch.ckpt"
            with contextlib.suppress(_KilledError):
                self.fit(
                    self.make(self.make_model()),
                    enable_checkpointing=True,
                    callbacks=[self.killed(saved)],
                )
            method = self.make(self.make_model())
            self.fit(method, checkpoint=saved)
        _require(
            state_hash(method.finalize()) == state_hash(self.plain.result),
            f"{self.name} ends with other weights when it is killed and resumed; keep its state in "
            "buffers or parameters",
        )
        _require(
            method.cost() == self.plain.method.cost(),
            f"{self.name} counts another cost when it is killed and resumed",
        )

    def check_processes(self) -> None:
        """Two processes give the weights of one, in double precision but for rounding."""
        if self.plain.method.view is None:
            return
        one = self.forget(self.make_model(), **self.exact)
        given = self.make_model()
        strategy = "ddp_fork"
        if given.find_unused_parameters:
            strategy += "_find_unused_parameters_true"
        two = self.forget(given, **self.exact, devices=2, strategy=strategy)
        for name, found in one.result.state_dict().items():
            # The weights come back from forked processes in single precision.
            value, other = found.double(), two.result.state_dict()[name].double()
            _require(
                torch.allclose(value, other, rtol=1e-5, atol=1e-7),
                f"{self.name} gives other weights on two processes than on one: '{name}' differs "
                f"by up to {float((value - other).abs().max()):.2g}; use `global_mean`, and add up "
                "sums over processes once",
            )
        _require(
            one.method.cost() == two.method.cost(),
            f"{self.name} counts another cost on two processes ({two.method.cost()}) than on one "
            f"({one.method.cost()})",
        )

    def check_divergence(self) -> None:
        """Input that is not finite stops a run with the step, before anything is returned."""
        method = self.make(self.make_model())
        if method.view is None:
            return
        try:
            self.fit(method, callbacks=[self.poison()])
        except DivergenceError as error:
            _require(
                "step" in str(error) and self.name in str(error),
                f"{self.name} stops at a loss that is not finite without naming the step: {error}",
            )
        else:
            raise AssertionError(
                f"{self.name} trains on through a loss that is not finite; raise DivergenceError"
            )


def check_method(
    method: MakeMethod,
    model: Callable[[], Model] = pattern_model,
    data: Callable[[], ForgetDataModule] = pattern_data,
    epochs: int = 2,
    forget_at_most: float = 0.35,
    retain_drop: float = 0.1,
    load: Callable[[Path], Model] = load_classifier,
) -> None:
    """Make all checks of a method; see `MethodChecks` for the arguments.

    Raises:
        AssertionError: the first check that fails, in one sentence.
    """
    MethodChecks(method, model, data, epochs, forget_at_most, retain_drop, load).run_all()


# ---- models -------------------------------------------------------------------------------------


def check_model(
    model: Model,
    batch: Batch,
    load: Callable[[Path], Model] = load_classifier,
    rebuilds: bool = True,
) -> None:
    """Check that a model behaves as its capabilities promise, not only that it has the methods.

    Args:
        model: in eval mode.
        batch: at least 3 samples; with ``caption``, a list of different texts, for models that
            read text.
        load: loads what `save_native` wrote.
        rebuilds: whether `fresh` must work; False for a network that was given as an object.

    Raises:
        AssertionError: the first promise that is broken, in one sentence.
    """
    before = state_hash(model)
    name, size = type(model).__name__, len(batch["weight"])
    with torch.no_grad():
        if isinstance(model, HasLogits):
            logits = model.logits(batch)
            _require(
                logits.shape == (size, model.num_classes),
                f"{name}.logits returns {tuple(logits.shape)} instead of (B, num_classes) = "
                f"{(size, model.num_classes)}",
            )
            _check_rows(f"{name}.logits", model.logits, batch)
        if isinstance(model, HasFeatures):
            features = model.features(batch)
            _require(
                features.shape == (size, model.num_features),
                f"{name}.features returns {tuple(features.shape)} instead of (B, num_features) = "
                f"{(size, model.num_features)}",
            )
            _check_rows(f"{name}.features", model.features, batch)
            if isinstance(model, HasLogits):
                _require(
                    torch.allclose(model.logits(batch, features=features), logits, atol=1e-5),
                    f"{name}.logits gives another result from given features",
                )
            if isinstance(model, HasHead):
                _require(
                    torch.allclose(model.head(features), logits, atol=1e-5),
                    f"{name}.head does not map the features to the logits",
                )
    if isinstance(model, HasLoss):
        _check_loss(model, batch)
    if isinstance(model, Sites):
        reads_text = isinstance(model, TextConditioned)
        for kind in get_args(SiteKind) if reads_text else ("ffn", "attention", "all"):
            _check_sites(model, kind)
    if isinstance(model, TextConditioned):
        _check_text(model, batch["caption"][:3])
    if isinstance(model, Generates):
        _check_pictures(model, batch["caption"][:3])
    _require(
        state_hash(copy.deepcopy(model)) == before, f"a deep copy of {name} differs from the model"
    )
    check_saved(model, batch, load, name)
    if rebuilds:
        _check_fresh(model)
    _require(state_hash(model) == before, f"{name} changes when it is only read")


@torch.no_grad()
def check_saved(model: Model, batch: Batch, load: Callable[[Path], Model], name: str) -> None:
    """Check that native weights give the outputs of the model that wrote them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_native(Path(folder))
        loaded = load(Path(folder)).eval()
    _require(
        state_hash(loaded) == state_hash(model),
        f"{name}: the loaded weights differ from those that were saved",
    )
    if isinstance(model, HasLogits) and isinstance(loaded, HasLogits):
        _require(
            torch.allclose(loaded.logits(batch), model.logits(batch), atol=1e-6),
            f"{name}: the loaded model gives other outputs than the saved one",
        )


def _check_rows(name: str, function: Callable[[Batch], Tensor], batch: Batch) -> None:
    single = torch.cat([function(_rows(batch, slice(i, i + 1))) for i in range(3)])
    _require(
        torch.allclose(single, function(batch)[:3], rtol=1e-3, atol=1e-4),
        f"{name} of a sample depends on the other samples of its batch",
    )


def _check_loss(model: Any, batch: Batch) -> None:
    name, function = type(model).__name__, model.loss
    loss = function(batch)
    _require(
        loss.shape == batch["weight"].shape,
        f"{name}.loss returns {tuple(loss.shape)} instead of one value per sample",
    )
    found = torch.autograd.grad(
        loss.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    _require(
        any(g is not None and bool(g.any()) for g in found),
        f"{name}.loss has no gradient for any parameter",
    )
    with torch.no_grad():
        _check_rows(f"{name}.loss", function, batch)
        if isinstance(model, HasFeatures):
            features = model.features(batch)
            _require(
                torch.allclose(function(batch, features=features), loss, atol=1e-5),
                f"{name}.loss gives another result from given features",
            )


@torch.no_grad()
def _check_text(model: Any, prompts: list[str]) -> None:
    name, layers = type(model).__name__, model.text_layers()
    _require(bool(layers), f"{name}.text_layers is empty instead of raising CapabilityError")
    together, reads = model.encode(prompts), {"states": model.encode(prompts).states}
    if together.pooled is not None:
        reads["pooled"] = together.pooled
    for layer in layers:
        _require(
            model.network.get_submodule(layer.name) is layer.module,
            f"{name}.text_layers gives another layer than the one named '{layer.name}'",
        )
        _require(
            layer.reads in reads and layer.columns == reads[layer.reads].shape[-1],
            f"{name}.text_layers says that '{layer.name}' reads {layer.columns} columns of "
            f"`{layer.reads}`, which `encode` does not return",
        )
    for row, prompt in enumerate(prompts):
        single = model.encode([prompt])
        for part in reads:
            _require(
                torch.allclose(getattr(single, part)[0], reads[part][row], rtol=1e-3, atol=1e-4),
                f"{name}.encode of a prompt depends on the other prompts of its batch",
            )
    _require(len(model.unconditional()) == 1, f"{name}.unconditional returns more than one row")
    length = reads["states"].shape[1]
    for segment in model.segments(prompts):
        _require(
            segment.ids.shape == segment.content.shape
            and len(segment.ids) == len(prompts)
            and segment.start + segment.ids.shape[1] <= length,
            f"{name}.segments describes positions that the states of `encode` do not have",
        )
        _require(
            bool(segment.content.any(1).all())
            and not bool(segment.content[:, : segment.begin].any()),
            f"{name}.segments does not mark the tokens of the texts as `content`",
        )
    try:
        model.encode([" ".join([prompts[0]] * 1000)])
    except RequestError as error:
        _require("\n" not in str(error), f"{name}.encode refuses a long prompt in several lines")
    else:
        raise AssertionError(f"{name}.encode truncates a prompt of thousands of words silently")


@torch.no_grad()
def _check_pictures(model: Any, conditions: list[str]) -> None:
    name = type(model).__name__
    torch.manual_seed(1)
    images = model.generate(conditions, 2, 0)
    _require(
        images.ndim == 4 and images.shape[:2] == (2 * len(conditions), 3),
        f"{name}.generate returns {tuple(images.shape)} for {len(conditions)} conditions and 2 "
        "pictures each instead of (len(condition) * n, 3, H, W)",
    )
    _require(
        bool(((images >= 0) & (images <= 1)).all()),
        f"{name}.generate returns values outside [0, 1]",
    )
    torch.manual_seed(2)
    _require(
        torch.equal(model.generate(conditions, 2, 0), images),
        f"{name}.generate gives other pictures with the same seed",
    )
    for what, one, other in (
        ("seed", model.generate(conditions, 1, 1), images[::2]),
        ("number", images[1::2], images[::2]),
        ("condition", images.roll(2, 0), images),
    ):
        _require(
            not torch.allclose(one, other, atol=1e-3),
            f"{name}.generate makes the same pictures whatever the {what} is",
        )
    alone = model.generate(conditions[1:2], 1, 0)[0]
    _require(
        torch.allclose(alone, images[2], rtol=1e-2, atol=1e-3),
        f"{name}.generate of a condition depends on the other conditions or on the number of "
        "pictures",
    )


def _check_sites(model: Any, kind: SiteKind) -> None:
    name = type(model).__name__
    try:
        sites = model.sites(kind)
    except CapabilityError:
        return
    _require(bool(sites), f"{name}.sites('{kind}') is empty instead of raising CapabilityError")
    names = [site.name for site in sites]
    _require(len(set(names)) == len(names), f"{name}.sites('{kind}') names a layer twice")
    for site in sites:
        _require(
            model.network.get_submodule(site.name) is site.module,
            f"{name}.sites('{kind}') gives another layer than the one named '{site.name}'",
        )
        _require(
            isinstance(site.module, nn.Linear | nn.Conv2d),
            f"{name}.sites('{kind}') gives '{site.name}', a {type(site.module).__name__}",
        )
        _require(
            site.name.startswith(site.block),
            f"{name}.sites('{kind}') says that '{site.name}' lies in block '{site.block}'",
        )
        _require(
            not isinstance(model, HasHead) or site.module not in set(model.head.modules()),
            f"{name}.sites('{kind}') contains the head",
        )


def _check_fresh(model: Model) -> None:
    name = type(model).__name__
    state = torch.get_rng_state()
    one, same, other = model.fresh(1), model.fresh(1), model.fresh(2)
    _require(state_hash(one) == state_hash(same), f"{name}.fresh(1) differs from {name}.fresh(1)")
    _require(state_hash(one) != state_hash(other), f"{name}.fresh(1) equals {name}.fresh(2)")
    _require(
        torch.equal(torch.get_rng_state(), state), f"{name}.fresh changes the global generator"
    )
    _require(
        list(one.state_dict()) == list(model.state_dict()),
        f"{name}.fresh builds other parameters than those of the model",
    )
    # Frozen companions of the network, such as text encoders, stay.
    pairs = zip(one.network.named_parameters(), model.network.parameters(), strict=True)
    inherited = [
        key
        for (key, new), old in pairs
        if torch.equal(new, old) and bool((old != old.reshape(-1)[0]).any())
    ]
    _require(not inherited, f"{name}.fresh inherits trained weights of the model: {inherited[:3]}")


# ---- tools --------------------------------------------------------------------------------------


def quiet_trainer(**settings: Any) -> Trainer:
    """A trainer on one CPU process that prints nothing and leaves nothing on the disk."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    return Trainer(**(quiet | settings))


def whole(dataset: ImageDataset) -> dict[str, Tensor]:
    """A data set as one batch."""
    return dataset[list(range(len(dataset)))]


@torch.no_grad()
def accuracy(model: Any, batch: Batch) -> float:
    """Share of a batch that a model classifies correctly, in eval mode."""
    return float((model.eval().logits(batch).argmax(-1) == batch["label"]).double().mean())


def _rows(batch: Batch, rows: slice) -> dict[str, Any]:
    return {key: value[rows] for key, value in batch.items()}


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


class _Bare(Model):
    """A model that offers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)

    def save_native(self, folder: Path) -> None:
        """Write nothing: it only serves to be refused."""

    def fresh(self, seed: int) -> _Bare:
        """The same again."""
        return _Bare()


class _KilledError(Exception):
    """Stands for the end of the process."""


class _SaveAndKill(Checkpoint):
    """Saves after the first epoch and ends the run at the start of the second, if there is one.

    Args:
        path: of the checkpoint.
        step: save after this step instead, and end the run at the one after the next.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Called by Lightning, after the method's own hook."""
        if self.step is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Called by Lightning."""
        if self.step is not None and trainer.global_step == self.step + 1:
            raise _KilledError

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Called by Lightning, after the method's own hook."""
        if self.step is None:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Called by Lightning."""
        if self.step is None and trainer.current_epoch == 1:
            raise _KilledError


class _Poison(Callback):
    """Makes the input of the second batch NaN.

    Args:
        key: of the input in a batch.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Called by Lightning."""
        if batch_idx == 1:
            for part in batch.values() if self.key not in batch else (batch,):
                part[self.key].fill_(float("nan"))
