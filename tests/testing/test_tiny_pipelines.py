"""The tiny pipelines are what they say, small, and the same every time."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.testing.tiny_pipelines import WORDS, TinyKind, tiny_pipeline

CLASSES = {
    "sd": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_kinds(kind: TinyKind) -> None:
    state = torch.get_rng_state()
    pipe, same, other = tiny_pipeline(kind), tiny_pipeline(kind), tiny_pipeline(kind, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(pipe).__name__ == CLASSES[kind]
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    assert len(parts) >= 3
    for name, part in parts.items():
        assert not part.training
        assert sum(p.numel() for p in part.parameters()) < 300_000
        assert state_hash(part) == state_hash(getattr(same, name))
        assert state_hash(part) != state_hash(getattr(other, name))


def test_what_distinguishes_them() -> None:
    assert tiny_pipeline("sd").scheduler.config.prediction_type == "epsilon"
    assert tiny_pipeline("sd2").scheduler.config.prediction_type == "v_prediction"
    assert tiny_pipeline("sd3").transformer.config.dual_attention_layers == ()
    assert tiny_pipeline("sd35").transformer.config.dual_attention_layers == (0,)


def test_every_word_is_one_token_of_every_tokenizer() -> None:
    for kind in ("sdxl", "sd3", "flux"):
        pipe = tiny_pipeline(kind)
        for key in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(pipe, key, None)
            if tokenizer is not None:
                ids = tokenizer(list(WORDS), add_special_tokens=False).input_ids
                assert all(len(row) == 1 for row in ids)
                assert len({row[0] for row in ids}) == len(WORDS)


def test_unknown_kinds() -> None:
    with pytest.raises(ConfigurationError, match="`kind` is 'fluxx', did you mean 'flux'"):
        tiny_pipeline("fluxx")  # type: ignore[arg-type]
