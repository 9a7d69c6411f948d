"""Judges and the counts that are made of what they see."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from mmforget import DigitWorld
from mmforget.data.digit_captions import DIGIT_TEMPLATES
from mmforget.data.digit_world import DIGITS
from mmforget.errors import ConfigurationError, DataError, MissingFileError, ModelError
from mmforget.metrics.judge import (
    ClassifierJudge,
    ClipJudge,
    ConceptRates,
    Count,
    Judge,
    load_judge,
    value_index,
)
from mmforget.models.clip import load_clip


class Brightness:
    """Says how bright a picture is: dark, middle or light."""

    factors = {"light": ("dark", "middle", "light")}
    accuracy = {"light": 1.0}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        level = (images.mean((1, 2, 3)) * 3).long().clamp(max=2)
        return {"light": torch.nn.functional.one_hot(level, 3).float()}


def grey(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4).clone()


def real(count: int, label: str = "digit") -> tuple[torch.Tensor, torch.Tensor]:
    data = DigitWorld(label=label).dataset("test")
    rows = np.arange(0, len(data), len(data) // count)[:count]
    return data.images(rows), torch.from_numpy(data.labels[rows])


def test_the_shipped_judge_reads_real_pictures():
    judge = load_judge()
    assert isinstance(judge, Judge)
    for factor in ("digit", "ink"):
        images, labels = real(100, factor)
        found = judge(images)[factor]
        torch.testing.assert_close(found.sum(1), torch.ones(100))
        assert (found.argmax(1) == labels).double().mean() >= judge.accuracy[factor] - 0.05


def test_judges_that_cannot_be(tmp_path):
    with pytest.raises(MissingFileError, match=r"training\.json"):
        load_judge(tmp_path)
    with pytest.raises(ModelError, match=r"2 values.*22 outputs"):
        ClassifierJudge(load_judge().classifier, {"digit": ("one", "two")})


def test_zero_shot_by_hand():
    model = load_clip()
    templates = ("the digit {}", "a picture of a {}")
    judge = ClipJudge(model, {"digit": ("one", "seven")}, {"digit": templates}, {"digit": 0.9})
    assert isinstance(judge, Judge)
    images, _ = real(5)
    with torch.no_grad():
        image = model.encode_images(images)
        scores = []
        for word in ("one", "seven"):
            mean = torch.stack([model.encode_texts([t.format(word)])[0] for t in templates]).mean(0)
            scores.append(100 * image @ (mean / mean.norm()))
    expected = torch.stack(scores, 1).softmax(1)
    torch.testing.assert_close(judge(images)["digit"], expected, atol=1e-5, rtol=1e-4)


def test_the_shipped_clip_as_a_judge():
    judge = ClipJudge(load_clip(), {"digit": DIGITS}, {"digit": DIGIT_TEMPLATES}, batch_size=64)
    images, labels = real(150)
    assert (judge(images)["digit"].argmax(1) == labels).double().mean() > 0.85


def test_zero_shot_judges_that_cannot_be():
    model = load_clip()
    with pytest.raises(ConfigurationError, match="did you mean 'digit'"):
        ClipJudge(model, {"digit": ("one", "two")}, {"digits": ("{}",)})
    for values in ((), ("one",), ("one", "one")):
        with pytest.raises(ConfigurationError, match="at least two"):
            ClipJudge(model, {"digit": values})
    with pytest.raises(ConfigurationError, match="template"):
        ClipJudge(model, {"digit": ("one", "two")}, {"digit": ("no place",)})


def test_value_index():
    assert value_index(Brightness(), "light", "middle") == 1
    with pytest.raises(ConfigurationError, match="no factor 'colour', valid are: 'light'"):
        value_index(Brightness(), "colour", "red")
    with pytest.raises(ConfigurationError, match="did you mean 'dark'"):
        value_index(Brightness(), "light", "darc")


def test_rates_by_hand():
    rates = ConceptRates(Brightness(), "light", ("target", "synonyms"))
    rates.update(grey(0.1, 0.9, 0.2), torch.tensor([0, 0, 2]), "target")
    rates.update(grey(0.5), "middle", "target")
    rates.update(grey(0.9, 0.9), ["light", "dark"], "synonyms")
    rates.update(grey(), torch.zeros(0, dtype=torch.int64), "target")
    found = rates.compute()
    assert found["target"].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert found["synonyms"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert rates.counts("dark", "target") == Count(1, 2)
    assert rates.counts("middle", "synonyms") == Count(0, 0)
    rates.reset()
    with pytest.raises(DataError, match="no picture"):
        rates.compute()


def test_black_pictures_do_not_count_as_erased(caplog):
    rates = ConceptRates(Brightness(), "light")
    images = grey(0.0, 0.001, 0.9)
    rates.update(images, "light")
    with caplog.at_level(logging.WARNING, "mmforget"):
        assert rates.counts("light") == Count(1, 2)
    assert "1 pictures are black" in caplog.text and rates.left_out() == 1
    only = ConceptRates(Brightness(), "light")
    only.update(grey(0.0), "light")
    with pytest.raises(DataError, match="1 black"):
        only.compute()


def test_wrong_wishes():
    rates = ConceptRates(Brightness(), "light", ("a", "b"))
    with pytest.raises(ConfigurationError, match="`group` is 'None'"):
        rates.update(grey(0.5), "dark")
    with pytest.raises(DataError, match="2 pictures"):
        rates.update(grey(0.5, 0.6), torch.tensor([0]), "a")
    with pytest.raises(DataError, match="indices 0 to 2"):
        rates.update(grey(0.5), torch.tensor([3]), "a")
    with pytest.raises(ConfigurationError, match="no value 'black'"):
        rates.update(grey(0.5), "black", "a")
    with pytest.raises(ConfigurationError, match="no factor"):
        ConceptRates(Brightness(), "ink")
    for groups in ((), "ab", ("a", "a")):
        with pytest.raises(ConfigurationError, match="distinct"):
            ConceptRates(Brightness(), "light", groups)
