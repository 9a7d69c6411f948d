"""Generators of GANs, ours and other people's, as one Lightning module."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    DivergenceError,
    ModelError,
    suggest,
)
from mmforget.models.base import Batch, Latents, LatentSpace, Model, Site, SiteKind
from mmforget.models.generators import NETWORKS
from mmforget.models.generators.base import HasLayerGroups, Noise, StyleBased
from mmforget.models.native import Architecture, build, build_from, class_path, redrawn
from mmforget.models.weights import put_weights, read_weights, write_weights
from mmforget.seeds import derive, generator

Prior = Literal["normal", "uniform", "truncated_normal"]
ValueRange = Literal["tanh", "unit"]
LabelFormat = Literal["index", "one_hot"]

CONFIG_FILE = "generator.json"
WEIGHTS_FILE = "generator.safetensors"
DISCRIMINATOR_FILE = "discriminator.safetensors"
PROGRAM_FILE = "generator.pt2"

CHECKED = 64
SMALLEST_SPREAD = 0.02
"""Below this standard deviation over pictures, of values in [-1, 1], a generator has collapsed."""

SATURATED = 0.95
RECALIBRATION = 50
"""Batches from which BatchNorm statistics of the averaged weights are taken after training."""


class ImageGAN(Model):
    """The generator of a GAN behind one contract: latents in, pictures in [0, 1] out.

    Offers `Generates`, `HasLatents` and `Sites`. Pictures have three channels; those of a network
    with one channel are repeated. A picture depends on the seed, its number and its class only.

    ::

        model = load_gan("gan")                            # the digit world's
        images = model.generate([""], n=16, seed=0)        # (16, 3, 32, 32)
        ImageGAN("dcgan")                                  # a new one, `mmforget fit` trains it

    What a file of weights does not say has to be given: the distribution of the latents, the range
    of the output, and settings such as the `eps` of normalisations. `check_drawing` notices most
    mistakes.

    Args:
        network: ``dcgan``, ``stylegan2``, ``stylegan3``, ``biggan_deep``, the import path of a
            class, a function that builds a network, or a network. It is called with latents
            (B, latent_size), and with labels if there are classes, and returns (B, 1 or 3, H, W).
        network_args: arguments of the class.
        weights: file of native weights, safetensors or a plain state dict.
        latent_size: numbers in a latent; None takes the network's attribute of this name.
        num_classes: classes of a conditional network; None takes the network's attribute of this
            name, or the number of `class_names`, or 0.
        class_names: of a conditional network; without them classes are called by their numbers.
        prior: what latents are drawn from: ``normal``, ``uniform`` on [-1, 1], or
            ``truncated_normal`` on [-truncation, truncation].
        truncation: of ``truncated_normal``.
        value_range: of the network's output: ``tanh`` for [-1, 1], ``unit`` for [0, 1].
        label_format: ``index`` calls the network with (B,) int64, ``one_hot`` with (B, K) floats.
        discriminator: arguments of `ProjectionDiscriminator` for training; None takes its defaults.
        lr: learning rate of the generator.
        discriminator_lr: of the discriminator; None takes `lr`.
        beta1: of both Adams; their second beta is 0.99.
        averaging: step of the moving average of the generator's weights, in (0, 1]; what training
            leaves is the average.
        allow_pickle: execute the code in a pickle named by `weights`.

    Raises:
        ModelError: the network cannot be built, or its sizes are not known.
        MissingFileError, WeightsError: see `read_weights` and `put_weights`.
        ConfigurationError: a setting out of range.
    """

    def __init__(
        self,
        network: str | Callable[[], nn.Module] | nn.Module = "dcgan",
        network_args: dict[str, Any] | None = None,
        weights: str | Path | None = None,
        latent_size: int | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] = (),
        prior: Prior = "normal",
        truncation: float = 2.0,
        value_range: ValueRange = "tanh",
        label_format: LabelFormat = "index",
        discriminator: dict[str, Any] | None = None,
        lr: float = 4e-4,
        discriminator_lr: float | None = None,
        beta1: float = 0.5,
        averaging: float = 0.005,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("prior", prior, get_args(Prior)),
            ("value_range", value_range, get_args(ValueRange)),
            ("label_format", label_format, get_args(LabelFormat)),
        ):
            if value not in choices:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, choices)}")
        for name, rate in (("lr", lr), ("discriminator_lr", discriminator_lr or lr),
                           ("truncation", truncation)):  # fmt: skip
            if not rate > 0:
                raise ConfigurationError(f"`{name}` is {rate}, it must be positive")
        if not 0 <= beta1 < 1:
            raise ConfigurationError(f"`beta1` is {beta1}, it must lie in [0, 1)")
        if not 0 < averaging <= 1:
            raise ConfigurationError(f"`averaging` is {averaging}, it must lie in (0, 1]")
        self.architecture: Architecture | None
        if isinstance(network, str):
            self.architecture = Architecture(
                "custom", NETWORKS.get(network, network), args=dict(network_args or {})
            )
            built = build(self.architecture)
        elif network_args:
            raise ModelError(
                "`network_args` go with a network given by its name; leave them out or give it"
            )
        elif isinstance(network, nn.Module):
            self.architecture, built = None, network
        else:
            built, self.architecture = build_from(network)
        if weights is not None:
            put_weights(built, read_weights(weights, allow_pickle), weights)
        self.network: Any = built
        self.latent_size = _known("latent_size", latent_size, built, 1)
        self.num_classes = _known("num_classes", num_classes, built, 0, len(class_names))
        if class_names and len(class_names) != self.num_classes:
            raise ModelError(
                f"there are {len(class_names)} `class_names` for {self.num_classes} classes; name "
                "each of them once"
            )
        self.class_names = tuple(class_names) or tuple(map(str, range(self.num_classes)))
        self.prior: Prior = prior
        self.truncation = truncation
        self.value_range: ValueRange = value_range
        self.label_format: LabelFormat = label_format
        self.discriminator_args = dict(discriminator or {})
        self.discriminator: nn.Module | None = None
        self._average: nn.Module | None = None
        self.lr, self.discriminator_lr = lr, discriminator_lr or lr
        self.beta1, self.averaging = beta1, averaging
        self.automatic_optimization = False
        self.channels, self.resolution = self._shape()
        self.save_hyperparameters(ignore=["network", "weights"])

    @torch.no_grad()
    def _shape(self) -> tuple[int, tuple[int, int]]:
        """Channels and (H, W) of a picture, by drawing one."""
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()  # BatchNorm in training mode would take this picture into account
        try:
            found = self._raw(self.mapped(self.draw(1, 0)))
        except (RuntimeError, TypeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(
                f"{type(self.network).__name__} cannot draw from latents of "
                f"{self.latent_size} numbers{' and labels' if self.num_classes else ''} "
                f"({reason}); check `latent_size`, `num_classes` and `label_format`"
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode
        if found.ndim != 4 or found.shape[1] not in (1, 3):
            raise ModelError(
                f"{type(self.network).__name__} returns shape {tuple(found.shape)}; a generator "
                "must return pictures (B, 1 or 3, H, W)"
            )
        return found.shape[1], (found.shape[2], found.shape[3])

    # ---- latents --------------------------------------------------------------------------------

    @property
    def latent_spaces(self) -> tuple[LatentSpace, ...]:
        """Where latents can live: ``z``; for style-based networks also ``w`` and ``w+``."""
        return ("z", "w", "w+") if isinstance(self.network, StyleBased) else ("z",)

    def draw(
        self, n: int, seed: int, first: int = 0, labels: Tensor | None = None, purpose: str = ""
    ) -> Latents:
        """Draw latents from the prior, on the CPU.

        Args:
            n: how many.
            seed: base of the draw.
            first: number of the first one; the latent of a number is always the same.
            labels: (n,) classes; None draws them uniformly if the network has classes.
            purpose: keeps draws for different uses apart.
        """
        rows, classes = [], []
        for number in range(first, first + n):
            source = generator(seed, f"latent{purpose}", number)
            if self.prior == "uniform":
                rows.append(torch.rand(self.latent_size, generator=source) * 2 - 1)
            elif self.prior == "normal":
                rows.append(torch.randn(self.latent_size, generator=source))
            else:
                row = torch.empty(self.latent_size)
                bound = self.truncation
                rows.append(nn.init.trunc_normal_(row, 0, 1, -bound, bound, generator=source))
            if self.num_classes:
                classes.append(torch.randint(self.num_classes, (), generator=source))
        codes = torch.stack(rows) if rows else torch.zeros(0, self.latent_size)
        if not self.num_classes:
            return Latents(codes)
        if labels is None:
            labels = torch.stack(classes) if classes else torch.zeros(0, dtype=torch.int64)
        return Latents(codes, labels)

    def mapped(self, latents: Latents, space: LatentSpace | None = None) -> Latents:
        """Bring latents into another space: from ``z`` to ``w``, from ``w`` to ``w+``.

        Args:
            latents: what to map.
            space: None takes the one that the network draws from: ``w+`` if it is style-based.

        Raises:
            CapabilityError: the network has no such space, or there is no way into it.
        """
        space = space or self.latent_spaces[-1]
        order: tuple[LatentSpace, ...] = ("z", "w", "w+")
        if space not in self.latent_spaces or order.index(space) < order.index(latents.space):
            raise CapabilityError(
                f"latents cannot go from '{latents.space}' to '{space}'; "
                f"{type(self.network).__name__} has {', '.join(self.latent_spaces)}, in this order"
            )
        if latents.space == "z" and space != "z":
            styles = self.network.map_latents(
                self._on_device(latents.codes), self._labels(latents.labels)
            )
            latents = Latents(styles, latents.labels, "w")
        if latents.space == "w" and space == "w+":
            spread = latents.codes[:, None].expand(-1, self.network.num_ws, -1)
            latents = Latents(spread, latents.labels, "w+")
        return latents

    def synthesise(self, latents: Latents, noise: Noise = "constant") -> Tensor:
        """Draw (B, 3, H, W) pictures, differentiable; tanh networks stay inside [0, 1] exactly.

        Args:
            latents: in any space of the network.
            noise: of style-based networks, see `StyleBased.synthesise`.
        """
        raw = self._raw(self.mapped(latents), noise)
        images = (raw + 1) / 2 if self.value_range == "tanh" else raw
        return images if self.channels == 3 else images.expand(-1, 3, -1, -1)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw (B, 3, H, W) pictures of latents (B, latent_size) and labels (B,)."""
        return self.synthesise(Latents(latents, labels))

    @torch.no_grad()
    def generate(self, condition: Sequence[str] = ("",), n: int = 1, seed: int = 0) -> Tensor:
        """See `mmforget.models.base.Generates`.

        Args:
            condition: class names; the empty text draws a class for each picture, and is the only
                condition of a network without classes.
            n: pictures per condition.
            seed: base of the draw.

        Raises:
            ConfigurationError: there is no such class.
        """
        parts = []
        for name in condition:
            labels = None
            if name:
                if name not in self.class_names:
                    raise ConfigurationError(
                        f"`condition` is '{name}', {suggest(name, ('', *self.class_names))}"
                    )
                labels = torch.full((n,), self.class_names.index(name))
            parts.append(self.pictures(self.draw(n, seed, labels=labels)))
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, latents: Latents, batch_size: int = 256) -> Tensor:
        """Draw (n, 3, H, W) pictures in [0, 1], in eval mode and in batches."""
        starts = range(0, len(latents), batch_size)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            parts = [self.synthesise(latents[s : s + batch_size]).clamp(0, 1) for s in starts]
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.cat(parts)

    def _raw(self, latents: Latents, noise: Noise = "constant") -> Tensor:
        codes = self._on_device(latents.codes)
        if latents.space == "w+":
            return cast(Tensor, self.network.synthesise(codes, noise=noise))
        if self.num_classes:
            return cast(Tensor, self.network(codes, self._labels(latents.labels)))
        return cast(Tensor, self.network(codes))

    def _on_device(self, codes: Tensor) -> Tensor:
        like = next(self.network.parameters())
        return codes.to(device=like.device, dtype=like.dtype)

    def _labels(self, labels: Tensor | None) -> Tensor | None:
        if not self.num_classes:
            return None
        if labels is None:
            raise ModelError(
                f"{type(self.network).__name__} has {self.num_classes} classes, so its latents "
                "need `labels`; `draw` gives them"
            )
        like = next(self.network.parameters())
        if self.label_format == "index":
            return labels.to(like.device)
        hot = nn.functional.one_hot(labels.long(), self.num_classes)
        return hot.to(device=like.device, dtype=like.dtype)

    # ---- parts ----------------------------------------------------------------------------------

    def layer_groups(self) -> dict[str, list[str]]:
        """Names of the network's parameters, by group in forward order.

        A network without `layer_groups` of its own is grouped by its direct children.
        """
        if isinstance(self.network, HasLayerGroups):
            return {name: list(names) for name, names in self.network.layer_groups().items()}
        groups: dict[str, list[str]] = {}
        for name, _ in self.network.named_parameters():
            groups.setdefault(name.partition(".")[0], []).append(name)
        return groups

    def sites(self, kind: SiteKind) -> list[Site]:
        """Convolutions and linear layers, for the kind ``all``.

        Raises:
            CapabilityError: another kind, which generators do not have.
        """
        if kind != "all":
            raise CapabilityError(
                f"generators of GANs have no layers of the kind '{kind}'; use 'all'"
            )
        layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        found = [
            Site(name, module, name.rpartition(".")[0])
            for name, module in self.network.named_modules()
            if isinstance(module, layers)
        ]
        if not found:
            raise CapabilityError(f"{type(self.network).__name__} has no linear or conv layers")
        return found

    @torch.no_grad()
    def check_drawing(self) -> None:
        """Draw some pictures, and refuse a generator that cannot be right.

        Raises:
            ModelError: pictures that are not finite, all alike, or saturated, or outside of the
                range that was given.
        """
        images = torch.cat(
            [self.synthesise(self.draw(CHECKED, 0)[start : start + 8]) for start in
             range(0, CHECKED, 8)]
        ) * 2 - 1  # fmt: skip
        hint = (
            "check the weights (the average is meant, `g_ema`), `prior`, `value_range`, the `eps` "
            "of normalisations, and that it is in eval mode"
        )
        who = type(self.network).__name__
        if not images.isfinite().all():
            raise ModelError(f"{who} draws values that are not finite; {hint}")
        spread = float(images.std(dim=0).mean())
        if spread < SMALLEST_SPREAD:
            raise ModelError(
                f"{who} draws the same picture for every latent (standard deviation over pictures "
                f"{spread:.4f} of values in [-1, 1], below {SMALLEST_SPREAD}): it has collapsed; "
                + hint
            )
        saturated = float((images.abs() > 0.999).double().mean())
        if saturated > SATURATED:
            raise ModelError(
                f"{100 * saturated:.0f} % of the values of {who} are saturated; {hint}"
            )
        low, high = float(images.min()), float(images.max())
        if self.value_range == "unit" and (low < -1.05 or high > 1.05):
            raise ModelError(
                f"{who} draws values from {(low + 1) / 2:.2f} to {(high + 1) / 2:.2f}, but "
                "`value_range` is 'unit', [0, 1]; 'tanh' is [-1, 1]"
            )

    # ---- training -------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the discriminator and the average, which only training needs."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if self.discriminator is None:
            self.discriminator = self.new_discriminator()
        if self._average is None:
            self._average = copy.deepcopy(self.network).requires_grad_(False)

    def new_discriminator(self) -> nn.Module:
        """Build a discriminator for pictures of this generator, always with the same weights."""
        from mmforget.models.generators.discriminator import ProjectionDiscriminator

        if self.resolution[0] != self.resolution[1]:
            raise ModelError(
                f"the discriminator reads square pictures, those of this generator are "
                f"{self.resolution[0]}x{self.resolution[1]}"
            )
        shape: dict[str, Any] = {
            "resolution": self.resolution[0],
            "image_channels": self.channels,
            "num_classes": self.num_classes,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(0, "discriminator"))
            return ProjectionDiscriminator(**(shape | self.discriminator_args))

    def real(self, batch: Batch) -> Tensor:
        """Pictures of a batch as the discriminator sees them: in [-1, 1], with own channels.

        Raises:
            ModelError: pictures of another size.
        """
        images = batch["image"]
        if tuple(images.shape[-2:]) != self.resolution:
            raise ModelError(
                f"the data has pictures of {tuple(images.shape[-2:])}, the generator draws "
                f"{self.resolution}; change `network_args` or the data"
            )
        if self.channels == 1:
            images = images.mean(dim=1, keepdim=True)
        return images * 2 - 1

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of the discriminator, then one of the generator, with the hinge loss.

        Both use the same generated pictures, which spares a pass.

        Reference:
            Lim and Ye, Geometric GAN, 2017, arXiv 1705.02894.
        """
        first, second = cast(list[Any], self.optimizers())
        assert self.discriminator is not None
        real, weight = self.real(batch), batch["weight"]
        n, number = len(real), self.trainer.global_step // 2
        source = derive(self.seed_of_training, "gan", number, self.global_rank)
        labels = batch["label"] if self.num_classes else None
        latents = self.draw(n, source, labels=labels)
        fake = self._raw(self.mapped(latents), "random")
        if self.value_range == "unit":
            fake = fake * 2 - 1
        self.toggle_optimizer(second)
        both = None if labels is None else torch.cat([labels, labels])
        scores = self.discriminator(torch.cat([real, fake.detach()]), both)
        hinge = torch.relu(1 - scores[:n]) + torch.relu(1 + scores[n:])
        loss = (hinge * weight).sum() / weight.sum().clamp(min=1)
        self._step(second, loss, "discriminator")
        self.untoggle_optimizer(second)
        self.discriminator.requires_grad_(False)
        loss_of_generator = -self.discriminator(fake, labels).mean()
        self._step(first, loss_of_generator, "generator")
        self.discriminator.requires_grad_(True)
        self._follow()
        self._cool()
        self.log_dict(
            {"train/discriminator": loss.detach(), "train/generator": loss_of_generator.detach()},
            prog_bar=True, batch_size=n,
        )  # fmt: skip

    @property
    def seed_of_training(self) -> int:
        """Base of the latents of training: the trainer's data module has it."""
        data = getattr(self.trainer, "datamodule", None)
        return int(getattr(data, "seed", 0))

    def _step(self, optimizer: Any, loss: Tensor, who: str) -> None:
        if not torch.isfinite(loss):
            raise DivergenceError(
                f"the loss of the {who} is not finite at step {self.trainer.global_step}; lower "
                f"`lr` (now {self.lr:g})"
            )
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights."""
        assert self._average is not None
        for kept, new in zip(self._average.parameters(), self.network.parameters(), strict=True):
            kept.lerp_(new, self.averaging)

    def _cool(self) -> None:
        """Let the learning rates fall along a straight line over the second half."""
        trainer = self.trainer
        steps = trainer.max_steps if trainer.max_steps > 0 else math.inf
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            steps = min(steps, 2 * trainer.max_epochs * trainer.num_training_batches)
        if not math.isfinite(steps):
            return
        left = min(1.0, 2 * (1 - trainer.global_step / steps))
        rates = (self.lr, self.discriminator_lr)
        for optimizer, rate in zip(cast(list[Any], self.optimizers()), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * max(left, 1e-3)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """How the discriminator scores unseen real pictures and generated ones."""
        if self.discriminator is None:
            return
        real = self.real(batch)
        labels = batch["label"] if self.num_classes else None
        latents = self.draw(len(real), 0, first=batch_idx * len(real), labels=labels)
        fake = self._raw(self.mapped(latents))
        fake = fake if self.value_range == "tanh" else fake * 2 - 1
        for name, images in (("real", real), ("generated", fake)):
            score = self.discriminator(images, labels).mean()
            self.log(f"val/{name}", score, batch_size=len(real), sync_dist=True)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Put the average in place of the weights, with statistics of its own."""
        if self._average is None:
            return
        for name, value in self._average.named_parameters():
            self.network.get_parameter(name).copy_(value)
        self._average = None
        self.recalibrate()

    @torch.no_grad()
    def recalibrate(self, batches: int = RECALIBRATION, batch_size: int = 64) -> None:
        """Take the statistics of BatchNorm layers anew, over freshly drawn latents."""
        norms = [
            module
            for module in self.network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        momenta = [norm.momentum for norm in norms]
        self.network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for number in range(batches if norms else 0):
            latents = self.draw(batch_size, 0, number * batch_size, purpose="-statistics")
            self._raw(self.mapped(latents))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.network.eval()

    def configure_optimizers(self) -> Any:
        """Adam for the generator and for the discriminator."""
        assert self.discriminator is not None
        betas = (self.beta1, 0.99)
        return [
            torch.optim.Adam(self.network.parameters(), self.lr, betas=betas),
            torch.optim.Adam(self.discriminator.parameters(), self.discriminator_lr, betas=betas),
        ]

    # ---- saving and rebuilding ------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Everything but the weights that `load_gan` needs, as plain data."""
        named = self.architecture is not None and bool(self.architecture.name)
        return {
            "format": "mmforget.generator/1",
            "class_path": class_path(self.network),
            # None: nobody recorded the arguments, so loading needs the network itself
            "network_args": self.architecture.args if named and self.architecture else None,
            "latent_size": self.latent_size,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names) if self.num_classes else [],
            "prior": self.prior,
            "truncation": self.truncation,
            "value_range": self.value_range,
            "label_format": self.label_format,
            "channels": self.channels,
            "resolution": list(self.resolution),
            "discriminator": self.discriminator_args,
        }

    def save_native(self, folder: Path) -> None:
        """Write weights under the network's own names, and what else belongs to them.

        ``generator.safetensors`` loads into the user's network with safetensors alone;
        ``generator.json`` says the rest. A discriminator that is at hand is written beside it.
        """
        folder = Path(folder)
        text = json.dumps(self.describe(), indent=1, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_weights(self.network, folder / WEIGHTS_FILE)
        if self.discriminator is not None:
            write_weights(self.discriminator, folder / DISCRIMINATOR_FILE)

    def save_program(self, folder: Path) -> None:
        """Write ``generator.pt2``, which `torch.export.load` runs without mmforget.

        It is called with latents of any number of rows, and labels if there are classes, and
        returns what the network returns.
        """
        latents = self.draw(2, 0)
        args: list[Tensor] = [self._on_device(latents.codes)]
        labels = self._labels(latents.labels)
        if labels is not None:
            args.append(labels)
        rows = torch.export.Dim("rows")
        program = torch.export.export(
            self.network.eval(), tuple(args), dynamic_shapes=tuple({0: rows} for _ in args)
        )
        torch.export.save(program, Path(folder) / PROGRAM_FILE)

    def fresh(self, seed: int) -> Self:
        """See `mmforget.models.base.Model`."""
        if self.architecture is None:
            raise ModelError(
                "the network was given as an object, so it cannot be built anew; give its name or "
                "a function that builds it"
            )
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "fresh"))
            network = redrawn(self.architecture, self.network)
        like = next(self.network.parameters())
        new = type(self)(
            network.to(like.device),
            latent_size=self.latent_size,
            num_classes=self.num_classes,
            class_names=self.class_names if self.num_classes else (),
            prior=self.prior,
            truncation=self.truncation,
            value_range=self.value_range,
            label_format=self.label_format,
            discriminator=self.discriminator_args,
            lr=self.lr,
            discriminator_lr=self.discriminator_lr,
            beta1=self.beta1,
            averaging=self.averaging,
        )
        new.architecture = replace(self.architecture)
        return new


def _known(
    name: str, given: int | None, network: nn.Module, least: int, fallback: int | None = None
) -> int:
    """A size that the user gives or the network has."""
    value = given if given is not None else getattr(network, name, fallback or None)
    if value is None and least == 0:
        value = 0
    if not isinstance(value, int) or value < least:
        raise ModelError(
            f"`{name}` of {type(network).__name__} is {value}; give how many it has, at least "
            f"{least}"
        )
    return value
