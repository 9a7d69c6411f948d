"""Tiny multimodal language models of every supported family, with processors, from configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from mmforget.errors import ConfigurationError, suggest

TinyMultimodalKind = Literal["llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "internvl"]

SIDE = 32
"""Side of the pictures that the towers take, in pixels (Qwen: that of the tests)."""

_TEXT = """
what which who where how is are the this that a an of in on it there digit colour many name me tell
give please shown person lives zero one two three four five six seven eight nine red green blue
white yes no anna bert clara paris rome oslo ? . : , look again sorry i cannot answer user assistant
"""

WORDS = (*_TEXT.split(),)
"""Words of the tokenizers, if no others are given."""

_LLAVA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ ' ASSISTANT: ' }}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_IDEFICS = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def sentence_tokenizer(
    words: Sequence[str],
    special: Sequence[str] = (),
    eos: str = "</s>",
    named: dict[str, str] | None = None,
    chat_template: str | None = None,
) -> Any:
    """Build a tokenizer in which every word is one token, and every other one unknown.

    Args:
        words: lower-case; sentences are split at white space and punctuation.
        special: further special tokens, such as placeholders for pictures.
        eos: the token that ends an answer.
        named: special tokens that a processor asks its tokenizer for, by name.
        chat_template: of conversations.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with ids 0 to 3 for padding, begin, end and
        unknown words.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = named or {}
    extra = [token for token in dict.fromkeys((*special, *named.values())) if token != eos]
    vocabulary = {
        word: row
        for row, word in enumerate(dict.fromkeys(("<pad>", "<s>", eos, "<unk>", *extra, *words)))
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        extra_special_tokens=named or extra,
        chat_template=chat_template,
        padding_side="left",
    )


def tiny_multimodal(
    kind: TinyMultimodalKind, words: Sequence[str] = WORDS, seed: int = 0, **settings: Any
) -> tuple[Any, Any]:
    """Build a network of random weights and its processor.

    Every language model has three decoder layers, four query heads and two key heads.

    Args:
        kind: type of the network.
        words: that the tokenizer knows.
        seed: of the weights.
        **settings: fields of the language model's configuration.

    Returns:
        The network, in evaluation mode, and its processor.

    Raises:
        ConfigurationError: an unknown kind.
    """
    if kind not in get_args(TinyMultimodalKind):
        raise ConfigurationError(
            f"`kind` is '{kind}', {suggest(kind, get_args(TinyMultimodalKind))}"
        )
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    } | settings
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        build = {"llava": _llava, "internvl": _internvl}.get(kind)
        if build is None:
            build = _idefics if kind in ("idefics3", "smolvlm") else _qwen
        network, processor = build(kind, words, text)
    network.generation_config.pad_token_id = 0
    network.generation_config.eos_token_id = 2
    network.generation_config.bos_token_id = 1
    return network.eval(), processor


def _image_size() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def _llava(kind: str, words: Sequence[str], text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = sentence_tokenizer(words, ["<image>"], chat_template=_LLAVA)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 8,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer)} | text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    images = CLIPImageProcessor(size=_image_size(), do_center_crop=False)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA,
    )
    return LlavaForConditionalGeneration(config), processor


def _internvl(kind: str, words: Sequence[str], text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
        "im_start": "<|im_start|>",
    }
    template = _CHATML.replace("IMAGE", "<IMG_CONTEXT>\\n")
    tokenizer = sentence_tokenizer(words, (), "<|im_end|>", named, template)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [SIDE, SIDE],
            "patch_size": [4, 4],
        },
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer)} | text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        image_seq_length=16,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=_image_size(), crop_to_patches=False),
        tokenizer,
        InternVLVideoProcessor(size=_image_size()),
        image_seq_length=16,
        chat_template=template,
    )
    return InternVLForConditionalGeneration(config), processor


def _idefics(kind: str, words: Sequence[str], text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    special = ["<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = sentence_tokenizer(words, special, "<end_of_utterance>", chat_template=_IDEFICS)
    name = "SmolVLM" if kind == "smolvlm" else "Idefics3"
    config = getattr(transformers, f"{name}Config")(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 4,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer)} | text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    processor = transformers.Idefics3Processor(  # SmolVLM's own one also wants num2words
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": SIDE},
            max_image_size={"longest_edge": SIDE},
            do_image_splitting=False,
        ),
        tokenizer,
        image_seq_len=16,
        chat_template=_IDEFICS,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _qwen(kind: str, words: Sequence[str], text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    template = _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer = sentence_tokenizer(
        words, [*special, "<|im_start|>"], "<|im_end|>", chat_template=template
    )
    ids = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            tokenizer.convert_tokens_to_ids(special),
            strict=True,
        )
    )
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 24, "hidden_size": text["hidden_size"], "mlp_ratio": 2}
    else:
        vision |= {
            "hidden_size": 24,
            "out_hidden_size": text["hidden_size"],
            "intermediate_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    name = "Qwen2VL" if kind == "qwen2_vl" else "Qwen2_5_VL"
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope} | text,
        **ids,
    )
    processor = getattr(transformers, f"{name}Processor")(
        transformers.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=SIDE * SIDE
        ),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=template,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def tiny_pictures(number: int, seed: int = 0) -> list[torch.Tensor]:
    """Pictures of noise, uint8 (3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        for _ in range(number)
    ]
