"""The conformance checks of methods on detectors: those of classifiers, and average precision.

::

    from mmforget.testing.detection_conformance import DetectorMethodChecks

    DetectorMethodChecks(lambda model: MyMethod(model, lr=1e-3)).run_all()
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmforget.audit.detector_outputs import role_precision
from mmforget.data.base import ForgetDataModule
from mmforget.data.digit_scenes import DigitScenes
from mmforget.models.base import Model, state_hash
from mmforget.models.detector import Detector, load_detector
from mmforget.request import ForgetRequest
from mmforget.testing.conformance import MakeMethod, MethodChecks, Run, _require

SHIPPED = Path(__file__).parents[1] / "assets" / "digit_world" / "detector"


def shipped_detector() -> Detector:
    """The shipped detector of digit scenes."""
    return load_detector(SHIPPED)


def few_scenes() -> ForgetDataModule:
    """24 training scenes in batches of eight, with a request for one of the ten digits."""
    data = DigitScenes(scenes=24, eval_scenes=8, batch_size=8)
    data.request(ForgetRequest(classes=("seven",)))
    return data


def many_scenes() -> ForgetDataModule:
    """160 training and 60 test scenes with the same request."""
    data = DigitScenes(scenes=160, eval_scenes=60, batch_size=16)
    data.request(ForgetRequest(classes=("seven",)))
    return data


class DetectorMethodChecks(MethodChecks):
    """The conformance checks of one method on the shipped detector.

    Mechanics are checked on few scenes, in seconds; ``effect`` on more of them.

    Args:
        method: makes the method for a model.
        epochs: of the mechanics, at least 2.
        effect_epochs: of the run in which it must forget.
        forget_at_most: average precision in [0, 1] that may be left of the forgotten class.
        retain_drop: average precision in [0, 1] that the other classes may lose.
        effect_data: makes the data of that run.
    """

    def __init__(
        self,
        method: MakeMethod,
        epochs: int = 2,
        effect_epochs: int = 4,
        forget_at_most: float = 0.1,
        retain_drop: float = 0.1,
        effect_data: Callable[[], ForgetDataModule] = many_scenes,
    ) -> None:
        super().__init__(
            method,
            model=shipped_detector,
            data=few_scenes,
            epochs=epochs,
            forget_at_most=forget_at_most,
            retain_drop=retain_drop,
            load=load_detector,
        )
        self.effect_epochs, self.effect_data = effect_epochs, effect_data

    def effect(self) -> tuple[Run, dict[str, float], dict[str, float]]:
        """A run that is long enough to forget, and average precisions before and after it."""
        longer = MethodChecks(
            self.make, self.make_model, self.effect_data, self.effect_epochs, load=self.load
        )
        run, data = longer.plain, self.effect_data()
        before, after = (_precision(model, data) for model in (run.given, run.result))
        return run, before, after

    def check_effect(self) -> None:
        """It forgets and retains by average precision, or is a control that says so."""
        given, method, result = self.plain
        changed = state_hash(given) != state_hash(result)
        _require(method.no_op == (not changed), f"{self.name} reports `no_op={method.no_op}`")
        if not method.expects_change:
            _require(not changed, f"{self.name} declares `expects_change=False`, but changes")
            return
        _require(changed, f"{self.name} changed no parameter: it is a no-op")
        _, before, after = self.effect()
        _require(
            before["forget"] > self.forget_at_most + 0.3,
            f"the original has an average precision of {before['forget']:.2f} on the forget set, "
            "so that forgetting cannot be seen",
        )
        _require(
            after["forget"] <= self.forget_at_most,
            f"{self.name} does not forget: average precision on the forget set went from "
            f"{before['forget']:.2f} to {after['forget']:.2f}, at most {self.forget_at_most:.2f} "
            "is accepted",
        )
        _require(
            after["retain"] >= before["retain"] - self.retain_drop,
            f"{self.name} does not retain: average precision on the retain set went from "
            f"{before['retain']:.2f} to {after['retain']:.2f}",
        )


def _precision(model: Model, data: ForgetDataModule) -> dict[str, float]:
    return {row["split"]: row["average_precision"] for row in role_precision(model, data)}
