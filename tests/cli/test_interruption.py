"""Ctrl-C in a real process: one line, exit code 130, and a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmforget.artifacts import Manifest

CONFIG = """
model: shipped:digit_world/classifier_vit
method: {class_path: GSLoRA}
data: {class_path: DigitWorld, init_args: {strokes: 100, variants: 2, batch_size: 16}}
request: {classes: [three]}
trainer: {max_epochs: 12, accelerator: cpu, enable_progress_bar: false}
audit: {enabled: false}
"""


@pytest.mark.slow
def test_ctrl_c_and_resume(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mmforget", "forget", "-c", str(config), "--run", str(run)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # a test runner in the background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = tmp_path / ".run.partial" / "checkpoints" / "request-1" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "continue with --resume" in error and "Traceback" not in error
    assert not run.exists()
    subprocess.run([*command, "--resume"], check=True, timeout=240)
    assert Manifest.read(run / "artifact").verify(run / "artifact") == []
