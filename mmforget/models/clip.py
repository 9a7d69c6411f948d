"""CLIP models of open_clip, as one Lightning module."""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import (
    AccessError,
    ConfigurationError,
    MissingFileError,
    ModelError,
    RequestError,
    suggest,
)
from mmforget.models.base import Batch, Model
from mmforget.models.native import hub_folder, to_device_of
from mmforget.models.weights import put_weights, read_weights, write_weights
from mmforget.seeds import derive

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
SHIPPED_CLIP = "digit_world"
LOCAL, HUB = "local-dir:", "hf-hub:"
TEXTS_AT_A_TIME = 512
RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


class ClipModel(Model):
    """A contrastive image-text network with its tokenizer, its preprocessing and its recipe.

    Offers `HasLoss` (the contrastive loss), `HasFeatures` (normalised image embeddings) and, if
    `class_texts` are given, `HasLogits` (zero-shot classification).

    ::

        model = load_clip("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
        cosine = model.encode_images(images) @ model.encode_texts(["a red seven"]).T

    Args:
        network: name of an architecture of open_clip such as ``ViT-B-32``, or its description:
            open_clip's ``embed_dim``, ``vision_cfg``, ``text_cfg``. Weights are drawn anew unless
            `weights` are given; `load_clip` reads folders and hub repositories.
        weights: file of native weights, safetensors or a plain state dict.
        tokenizer: a transformers tokenizer, a folder of one, or a tokenizer of open_clip; None
            takes the one that open_clip has for `network`.
        class_texts: names of the classes; without them there are no `logits`.
        templates: sentences with ``{}``, over whose embeddings a class is averaged.
        preprocess: overrides of open_clip's ``mean``, ``std``, ``interpolation``, ``resize_mode``,
            ``fill_color``.
        lr: highest learning rate of AdamW, with a one-cycle schedule.
        weight_decay: decoupled, for weights of at least two dimensions.
        warmup: share of the steps in (0, 1) over which the rate rises.

    Raises:
        ModelError: the network cannot be built.
        MissingFileError: a file is missing, or a tokenizer would have to be downloaded and cannot.
        WeightsError: `weights` do not fit, are damaged, or would execute code.
        ConfigurationError: a number of the recipe is out of range, or a template has no place for
            the word.

    Reference:
        Radford et al., Learning transferable visual models from natural language supervision,
        2021, arXiv 2103.00020.
    """

    def __init__(
        self,
        network: str | dict[str, Any] = "ViT-B-32",
        weights: str | Path | None = None,
        tokenizer: Any = None,
        class_texts: Sequence[str] = (),
        templates: Sequence[str] = ("{}",),
        preprocess: dict[str, Any] | None = None,
        lr: float = 5e-4,
        weight_decay: float = 0.2,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ConfigurationError(f"`lr` is {lr}, it must be positive")
        if not weight_decay >= 0:
            raise ConfigurationError(f"`weight_decay` is {weight_decay}, it must not be negative")
        if not 0 < warmup < 1:
            raise ConfigurationError(f"`warmup` is {warmup}, it must lie in (0, 1)")
        check_templates(templates)
        self.config = _described(network)
        self.tokenizer: Any = _tokenizer_for(self.config, network, tokenizer)
        built = _built(self.config)
        if weights is not None:
            _load(built, Path(weights))
        self.network: Any = built
        self.preprocess = _checked({**built.visual.preprocess_cfg, **(preprocess or {})})
        self.num_features = int(self.config["embed_dim"])
        self.class_texts, self.templates = tuple(class_texts), tuple(templates)
        if self.class_texts:
            # The protocol `HasLogits` asks for this attribute; without classes it is not offered.
            self.num_classes = len(self.class_texts)
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        # What a checkpoint can bring back; files and objects have to be given again.
        self.save_hyperparameters(ignore=["weights", "tokenizer"])

    # ---- the two encoders ---------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        """Tokens of a text at most, with begin and end."""
        return int(self.tokenizer.context_length)

    def encode_images(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) images in [0, 1] as (B, d) vectors of length 1."""
        like = next(self.network.parameters())
        ready = self.prepared(images.to(device=like.device, dtype=torch.float32))
        return cast(Tensor, self.network.encode_image(ready.to(like.dtype), normalize=True))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed n texts as (n, d) vectors of length 1.

        Raises:
            RequestError: there is no text, or one is longer than the context; none is truncated.
        """
        tokens = self.tokens(texts).to(next(self.network.parameters()).device)
        return cast(Tensor, self.network.encode_text(tokens, normalize=True))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return (n, L) token ids.

        Raises:
            RequestError: there is no text, or one is longer than the context; none is truncated.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if not given:
            raise RequestError("there is no text to encode; give at least one")
        found = cast(Tensor, self.tokenizer(given))
        # A text that was cut ends differently from the same text with room to spare. This holds
        # for every tokenizer of open_clip; one of its modes puts a token of its own at the end.
        stop = found.shape[1] - (getattr(self.tokenizer, "tokenizer_mode", "") == "clips")
        roomy = self.tokenizer(given, context_length=found.shape[1] + 1)
        cut = (found[:, :stop] != roomy[:, :stop]).any(dim=1)
        if cut.any():
            text = given[int(cut.int().argmax())]
            raise RequestError(
                f"the text '{text[:60]}{'…' if len(text) > 60 else ''}' has more tokens than the "
                f"{self.context_length} that the text encoder reads; shorten it"
            )
        return found

    def prepared(self, images: Tensor) -> Tensor:
        """Resize, crop and normalise as open_clip's preprocessing does, but on tensors.

        For pictures of the network's own size it is the same; else the difference is that Pillow
        rounds resized pictures to 256 levels.

        Shape: (B, 3, H, W) in [0, 1] to (B, 3, h, w).
        """
        size = self.preprocess["size"]
        target = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        mode = self.preprocess["resize_mode"]
        fitted = _resized(images, _fitting(images.shape[-2:], target, mode), self.preprocess)
        fitted = _centre(fitted, target, self.preprocess["fill_color"] / 255)
        mean, std = (
            torch.tensor(self.preprocess[key], device=images.device, dtype=images.dtype)
            for key in ("mean", "std")
        )
        return (fitted - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    # ---- capabilities -------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, C) zero-shot logits of (B, 3, H, W) images in [0, 1]."""
        return self.logits({"image": images})

    def features(self, batch: Batch) -> Tensor:
        """Return (B, d) normalised image embeddings."""
        return self.encode_images(batch["image"])

    def class_embeddings(
        self, words: Sequence[str], templates: Sequence[str] | None = None
    ) -> Tensor:
        """Embed words as the mean over sentences about them.

        Every sentence counts the same: the embeddings are normalised before and after averaging.

        Args:
            words: C names.
            templates: T sentences with ``{}``; None takes those of the model.

        Returns:
            (C, d) vectors of length 1.
        """
        sentences = self.templates if templates is None else tuple(templates)
        check_templates(sentences)
        texts = [sentence.format(word) for word in words for sentence in sentences]
        starts = range(0, len(texts), TEXTS_AT_A_TIME)
        parts = [self.encode_texts(texts[start : start + TEXTS_AT_A_TIME]) for start in starts]
        if not parts:
            raise RequestError("there are no class names to encode; give at least two")
        mean = torch.cat(parts).unflatten(0, (len(words), len(sentences))).mean(dim=1)
        return F.normalize(mean, dim=-1)

    def logits(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B, C) cosines with `class_texts`, times the network's learned scale.

        Raises:
            ModelError: the model has no `class_texts`.
        """
        if not self.class_texts:
            raise ModelError(
                "this CLIP model has no classes, so it gives no logits; name them by `class_texts`"
            )
        found = self.features(batch) if features is None else features
        return self.network.logit_scale.exp() * found @ self.class_embeddings(self.class_texts).T

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B,) contrastive losses of images and their captions, in nats.

        Per sample i, with p the softmax of the scaled cosines over the captions of the batch and q
        that over its images, the loss is -(log p_ii + log q_ii) / 2, whose mean is CLIP's loss.
        Samples with the same caption are right answers for each other, so log p_ii is the mean
        over all of them. A loss depends on the other samples of the batch; in several processes,
        each contrasts the samples of its own batch.

        Args:
            batch: ``image`` and ``caption``, B texts.
            features: (B, d) image embeddings of the same batch.

        Raises:
            AccessError: the batch has no captions.
        """
        if "caption" not in batch:
            raise AccessError(
                "the contrastive loss needs captions, which this batch does not carry; use data "
                "that has a `caption` for every image"
            )
        captions = list(batch["caption"])
        image = self.features(batch) if features is None else features
        scores = self.network.logit_scale.exp() * image @ self.encode_texts(captions).T
        index = {text: place for place, text in enumerate(dict.fromkeys(captions))}
        which = torch.tensor([index[text] for text in captions], device=scores.device)
        same = (which[:, None] == which).to(scores.dtype)
        same = same / same.sum(dim=1, keepdim=True)
        by_image = -(same * scores.log_softmax(dim=1)).sum(dim=1)
        by_text = -(same * scores.log_softmax(dim=0)).sum(dim=0)
        return (by_image + by_text) / 2

    # ---- training -----------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean contrastive loss over the samples of the batch, padding left out."""
        real = batch["weight"] > 0
        rows = [row for row, is_real in enumerate(real.tolist()) if is_real]
        part = {"image": batch["image"][real]}
        if "caption" in batch:
            part["caption"] = [batch["caption"][row] for row in rows]
        count = torch.tensor(float(len(rows)), device=real.device)
        total = self.trainer.strategy.reduce(count, reduce_op="sum").clamp(min=1)
        # A batch of padding alone still takes part, so that all processes exchange gradients.
        losses = self.loss(part) if rows else self._nothing()
        loss = self.trainer.world_size * losses.sum() / total
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=max(1, len(rows)))
        return loss

    def _nothing(self) -> Tensor:
        """A loss of 0 with a gradient of 0 for every parameter."""
        trained = [p.sum() for p in self.network.parameters() if p.requires_grad]
        return torch.stack(trained).sum() * 0

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the scale of the cosines at 100 at most, as CLIP does."""
        self.network.logit_scale.clamp_(max=math.log(100))

    def configure_optimizers(self) -> Any:
        """AdamW; its rate rises to `lr` and falls to almost 0, changing after every step."""
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigurationError(
                "the learning rate follows a schedule over all steps, but the trainer has no end; "
                "set `max_epochs` or `max_steps`"
            )
        trained = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98), eps=1e-6)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(steps), pct_start=self.warmup
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- saving and rebuilding ----------------------------------------------------------------

    def save_native(self, folder: Path) -> None:
        """Write what open_clip loads by ``local-dir:``; see `mmforget.models.base.Model`.

        The key ``mmforget`` of the configuration keeps classes and templates; open_clip does not
        read it.
        """
        folder = Path(folder)
        preprocess = {key: value for key, value in self.preprocess.items() if key != "size"}
        described: dict[str, Any] = {"model_cfg": self.config, "preprocess_cfg": preprocess}
        if self.class_texts or self.templates != ("{}",):
            described["mmforget"] = {
                "class_texts": list(self.class_texts),
                "templates": list(self.templates),
            }
        text = json.dumps(described, indent=1, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_weights(self.network, folder / WEIGHTS_FILE)
        if hasattr(self.tokenizer, "save_pretrained"):  # open_clip has its own one at hand
            self.tokenizer.save_pretrained(folder)

    def fresh(self, seed: int) -> Self:
        """Build the same model with newly drawn weights, in training mode.

        Args:
            seed: decides the weights; the global random generator is left as it is.
        """
        with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
            torch.default_generator.manual_seed(derive(seed, "fresh"))
            network = _built(self.config)
        to_device_of(network, self.network)
        # Everything else is copied; the trainer stays with this model.
        kept: dict[int, Any] = {id(self.network): network}
        if self._trainer is not None:
            kept[id(self._trainer)] = None
        return copy.deepcopy(self, kept).train()


def load_clip(
    source: str | Path | Mapping[str, Any] = SHIPPED_CLIP,
    weights: str | Path | None = None,
    tokenizer: Any = None,
    class_texts: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> ClipModel:
    """Load a CLIP model, in evaluation mode.

    Args:
        source: ``digit_world`` for the model that is shipped; an open_clip folder, with or without
            ``local-dir:``; a hub id ``hf-hub:owner/name`` (a download); the name of an architecture
            of open_clip, together with `weights`; or a description as `ClipModel` takes it, for
            newly drawn weights.
        weights: file of weights for the name of an architecture, or for a description.
        tokenizer: see `ClipModel`; None takes the one of the folder, or of open_clip.
        class_texts: see `ClipModel`; None takes what is recorded in the folder.
        templates: likewise.

    Raises:
        MissingFileError: there is no such folder, file or hub id.
        WeightsError: the weights are damaged, do not fit, or would execute code.
        ModelError: the network cannot be built, or an architecture is named without weights.
    """
    if isinstance(source, Mapping):
        return ClipModel(
            copy.deepcopy(dict(source)), weights, tokenizer, class_texts or (), templates or ("{}",)
        ).eval()
    name = str(source)
    path = _folder_of(name)
    if path is None:
        _described(name)
        if weights is None:
            raise ModelError(
                f"'{name}' names an architecture without weights; give their file as `weights`, or "
                f"a trained model as '{HUB}owner/name' or a folder"
            )
        return ClipModel(name, weights, tokenizer, class_texts or (), templates or ("{}",)).eval()
    if weights is not None:
        raise ModelError(f"'{name}' brings its own weights; leave out `weights`")
    config = _read_config(path)
    if tokenizer is None:
        tokenizer = _open_clip_tokenizer(name if name.startswith(HUB) else f"{LOCAL}{path}")
    noted = config.get("mmforget", {})
    return ClipModel(
        config["model_cfg"],
        _weights_file(path),
        tokenizer,
        noted.get("class_texts", ()) if class_texts is None else class_texts,
        noted.get("templates", ("{}",)) if templates is None else templates,
        config.get("preprocess_cfg"),
    ).eval()


def check_templates(templates: Sequence[str]) -> None:
    """Refuse sentences without exactly one place for the word.

    Raises:
        ConfigurationError: names the sentence.
    """
    if isinstance(templates, str) or not templates:
        raise ConfigurationError(
            f"`templates` is {templates!r}, it must be a list of at least one sentence with '{{}}'"
        )
    for sentence in templates:
        if sentence.count("{}") != 1:
            raise ConfigurationError(
                f"the template '{sentence}' must contain '{{}}' once, where the word goes"
            )


# ---- open_clip --------------------------------------------------------------------------------


@contextmanager
def _no_new_handler() -> Iterator[None]:
    """Keep open_clip, which logs through the root logger, from switching on output for everyone."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        yield
    finally:
        root.removeHandler(silent)


def _described(network: str | Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's description of an architecture."""
    if isinstance(network, str):
        import open_clip

        found = open_clip.get_model_config(network) if ":" not in network else None
        if found is None:
            raise ModelError(
                f"open_clip knows no architecture '{network}', "
                f"{suggest(network, open_clip.list_models())}"
            )
        return cast(dict[str, Any], found)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in network]
    if missing:
        raise ModelError(
            f"the description of a CLIP network lacks `{missing[0]}`; it needs `embed_dim`, "
            "`vision_cfg` and `text_cfg`"
        )
    return copy.deepcopy(dict(network))


def _built(config: Mapping[str, Any]) -> Any:
    """Build the network with weights from the global random generator.

    Not typed as a module, since open_clip has several classes of networks and no common base.
    """
    import open_clip

    # open_clip builds named and stored architectures only; a folder serves for any description.
    with tempfile.TemporaryDirectory() as folder, _no_new_handler():
        text = json.dumps({"model_cfg": dict(config)})
        (Path(folder) / CONFIG_FILE).write_text(text, encoding="utf-8")
        try:
            return open_clip.create_model(
                f"{LOCAL}{folder}", load_weights=False, pretrained_text=False
            )
        except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
            raise ModelError(
                f"open_clip cannot build this CLIP network ({str(error).splitlines()[0]}); check "
                "`vision_cfg` and `text_cfg`"
            ) from error


def _tokenizer_for(config: dict[str, Any], network: str | Mapping[str, Any], given: Any) -> Any:
    """The tokenizer in open_clip's form; notes in the description that there is one."""
    text_config = config["text_cfg"]
    if given is None:
        if text_config.get("hf_tokenizer_name") and not isinstance(network, str):
            raise ModelError(
                "the description of the network names a tokenizer that is not part of it; give "
                "`tokenizer`"
            )
        if isinstance(network, str):
            return _open_clip_tokenizer(network)
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=text_config.get("context_length", 77))
    if hasattr(given, "context_length"):
        return given
    from open_clip.tokenizer import HFTokenizer

    text_config.setdefault("hf_tokenizer_name", "local")
    settings = {
        "context_length": text_config.get("context_length", 77),
        "tokenizer_mode": text_config.get("tokenizer_mode"),
        **text_config.get("tokenizer_kwargs", {}),
    }
    if isinstance(given, str | Path):
        if not Path(given).is_dir():
            raise MissingFileError(
                f"there is no folder '{given}' for `tokenizer`; give one written by "
                "`tokenizer.save_pretrained`"
            )
        return HFTokenizer(str(given), **settings)
    if not hasattr(given, "save_pretrained"):
        raise ModelError(
            f"`tokenizer` is a {type(given).__name__}; give a transformers tokenizer, a folder of "
            "one, or a tokenizer of open_clip"
        )
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        return HFTokenizer(folder, **settings)


def _open_clip_tokenizer(name: str) -> Any:
    import open_clip

    with _no_new_handler():
        try:
            return open_clip.get_tokenizer(name)
        except (OSError, ValueError) as error:
            raise MissingFileError(
                f"the tokenizer of '{name}' cannot be loaded ({str(error).splitlines()[0]}); put "
                "its files into the folder, or give `tokenizer`"
            ) from error


def _load(network: nn.Module, path: Path) -> None:
    """Put weights into a network, also those written for open_clip's other text towers."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    found = convert_state_dict(network, read_weights(path))
    if "positional_embedding" in found and not hasattr(network, "positional_embedding"):
        found = convert_to_custom_text_state_dict(found)
    expected = network.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in found and name in expected and found[name].numel() == 1:
            found[name] = found[name].reshape(expected[name].shape)
    put_weights(network, found, path)


def _folder_of(name: str) -> Path | None:
    """Local folder with the files of a source; None for the name of an architecture."""
    if name == SHIPPED_CLIP:
        return Path(str(resources.files("mmforget") / "assets" / "digit_world" / "clip"))
    if name.startswith(HUB):
        return hub_folder(name.removeprefix(HUB), ["*.json", "*.txt", "open_clip_*.safetensors"])
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if path.is_dir():
        return path
    if name.startswith((LOCAL, ".", "/", "~")) or path.is_file():
        raise MissingFileError(
            f"there is no folder '{path}'; give one with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise MissingFileError(
            f"'{folder}' is no open_clip folder (it has no {CONFIG_FILE}); give one written by "
            "`save_native` or open_clip's `save_for_hf`"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"'{file}' is no JSON ({error}); write it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ModelError(f"'{file}' has no `model_cfg`; write the folder again")
    return config


def _weights_file(folder: Path) -> Path:
    for pattern in ("open_clip_*.safetensors", "*.safetensors", "open_clip_*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise MissingFileError(f"'{folder}' has no weights; put {WEIGHTS_FILE} into it")


# ---- preprocessing ----------------------------------------------------------------------------


def _checked(preprocess: dict[str, Any]) -> dict[str, Any]:
    for key, choices in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
        if preprocess[key] not in choices:
            raise ModelError(
                f"`{key}` of the preprocessing is '{preprocess[key]}', "
                f"{suggest(preprocess[key], choices)}"
            )
    return preprocess


def _fitting(shape: Sequence[int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Size to which a picture is resized before its centre is taken."""
    height, width = shape
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        long = int(target[0] * max(height, width) / min(height, width))
        return (target[0], long) if height <= width else (long, target[0])
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _resized(images: Tensor, size: tuple[int, int], preprocess: Mapping[str, Any]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    found = F.interpolate(
        images, size, mode=preprocess["interpolation"], align_corners=False, antialias=True
    )
    return found.clamp(0, 1)  # a bicubic curve overshoots, Pillow's levels cannot


def _centre(images: Tensor, target: tuple[int, int], fill: float) -> Tensor:
    """Take the centre, after padding what is too small."""
    for axis, size in ((-2, target[0]), (-1, target[1])):
        missing = size - images.shape[axis]
        if missing > 0:
            sides = (missing // 2, (missing + 1) // 2)
            pad = (*sides, 0, 0) if axis == -1 else (0, 0, *sides)
            images = F.pad(images, pad, value=fill)
        else:
            images = images.narrow(axis, round(-missing / 2), size)
    return images
