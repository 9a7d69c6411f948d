"""`mmforget fit` trains a generator, and what it leaves loads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmforget import load_gan
from mmforget.cli.main import main


def test_a_generator_is_trained_and_loads_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code = main([
        "fit", "--model", "ImageGAN", "--model.network", "dcgan",
        "--model.network_args", "{latent_size: 8, channels: [8, 8, 8, 8]}",
        "--model.discriminator", "{channels: [4, 4, 4]}",
        "--data", "DigitWorld", "--data.strokes", "20", "--data.variants", "2",
        "--data.batch_size", "16", "--trainer.max_epochs", "1", "--run", str(run),
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    assert code == 0
    model = load_gan(run / "weights", discriminator=True, check=False)
    images = model.generate([""], 4, 0)
    assert images.shape == (4, 3, 32, 32)
    assert torch.isfinite(images).all()
    assert str(run) in capsys.readouterr().out
