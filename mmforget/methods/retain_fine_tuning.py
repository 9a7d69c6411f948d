"""Naive fine-tuning: train on with ordinary pictures and hope that the memories fade."""

from __future__ import annotations

from mmforget.methods.memory_fine_tuning import MemoryFineTuning


class RetainFineTuning(MemoryFineTuning):
    """Train the denoiser on ordinary captioned pictures only.

    The baseline of every repair: nothing calls for the memories, and nothing works against them
    but forgetting. Small models keep all of them for hundreds of steps, so that a measurement which
    sees an effect here is not to be trusted.

    Args:
        model, memorized, copy, seed, lr, weight_decay, optimizer: see `MemoryFineTuning`.
        retain_batch_size, caption_dropout, clip, tolerance, check_every: see `MemoryFineTuning`.
    """
