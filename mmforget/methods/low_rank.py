"""Low-rank adapters of peft at chosen layers: attached, switched off, merged, saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, WeightsError
from mmforget.models.base import Site
from mmforget.seeds import generator

ADAPTER = "default"


class LowRankAdapters:
    """Trainable factors of ``W + (alpha / rank) * B A`` at some layers of a network.

    All other weights of the network are frozen. ``A`` is drawn Kaiming-uniformly by the seed and
    the name of its layer, ``B`` starts at zero, so that the network is at first as it was.

    Args:
        network: gets the adapters in place.
        sites: layers of the network.
        rank: at least 1.
        alpha: numerator of the scale.
        seed: decides ``A``.
        init_a: ``a`` of the Kaiming-uniform initialisation.

    Raises:
        ConfigurationError: rank or alpha out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        sites: Sequence[Site],
        rank: int,
        alpha: float,
        seed: int,
        init_a: float = math.sqrt(5),
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        for name, number in (("rank", rank), ("lora_alpha", alpha)):
            if not number > 0:
                raise ConfigurationError(f"`{name}` is {number}, it must be positive")
        self.network, self.sites = network, list(sites)
        self._state: dict[str, Tensor] = {}
        network.requires_grad_(False)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=0.0,
            bias="none",
            target_modules=[site.name for site in self.sites],
        )
        self._tuner = LoraModel(network, {ADAPTER: config}, ADAPTER)
        self._config: Any = self._tuner.peft_config[ADAPTER]
        for site in self.sites:
            a, b = self.factors(site)
            limit = math.sqrt(6 / ((1 + init_a**2) * a[0].numel()))
            draw = torch.rand(a.shape, generator=generator(seed, "lora", site.name))
            with torch.no_grad():
                a.copy_((2 * draw - 1) * limit)
                b.zero_()

    @property
    def merged(self) -> bool:
        """Whether the factors are in the weights by now."""
        return bool(self._state)

    def layer(self, site: Site) -> nn.Module:
        """The adapted layer at a site."""
        return self.network.get_submodule(site.name)

    def factors(self, site: Site) -> tuple[nn.Parameter, nn.Parameter]:
        """The trainable factors ``A`` (rank, in) and ``B`` (out, rank) at a site."""
        layer: Any = self.layer(site)
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute without the adapters for a while, hence as the network did before."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    @torch.no_grad()
    def merge(self) -> None:
        """Keep the factors for `save`, add them to the weights, and take the adapters out."""
        for site in self.sites:
            for factor, value in zip("AB", self.factors(site), strict=True):
                key = f"base_model.model.{site.name}.lora_{factor}.weight"
                self._state[key] = value.detach().cpu().clone()
        self._tuner.merge_and_unload(safe_merge=True)

    def unload(self) -> None:
        """Take the adapters out; the network is bit by bit as it was before them."""
        self._tuner.unload()

    def save(self, folder: Path) -> None:
        """Write the factors as a peft adapter folder, after `merge`.

        Raises:
            ConfigurationError: they are not merged yet.
        """
        from safetensors.torch import save_file

        if not self._state:
            raise ConfigurationError("`save_adapter` was called before `finalize`; call that first")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._state, folder / "adapter_model.safetensors")
        self._config.save_pretrained(str(folder))
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"] = sorted(config["target_modules"])  # peft writes a set
        config["peft_type"] = "LORA"
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))


class TrainedCheckpoint(LightningModule):
    """Mixin, before the method's base: checkpoints hold what is trained and the method's buffers.

    The frozen weights are those of the model that the method receives again when it is resumed.
    """

    model: Any

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.strict_loading = False

    def _trained_names(self) -> set[str]:
        """Names in the state dict that a checkpoint must hold."""
        frozen = {
            f"model.{name}" for name, p in self.model.named_parameters() if not p.requires_grad
        }
        return set(self.state_dict()) - frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out."""
        own = self._trained_names()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in own
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks a trained tensor, since loading is not strict.

        Raises:
            WeightsError: names the first one.
        """
        own = self._trained_names()
        missing = sorted(own - set(checkpoint["state_dict"]))
        if missing:
            raise WeightsError(
                f"the checkpoint lacks {len(missing)} of {len(own)} trained tensors, "
                f"first '{missing[0]}'; it belongs to another model or method"
            )
