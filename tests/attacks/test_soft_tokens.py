import copy

import pytest
import torch

from mmforget.attacks.soft_tokens import SoftTokens, tokenizers, vocabulary, word_rows
from mmforget.errors import ModelError
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import tiny_pipeline

KINDS = ("sd", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return DiffusionGenerator(tiny_pipeline(request.param))


def flat(embedding):
    parts = [embedding.states, *([] if embedding.pooled is None else [embedding.pooled])]
    return torch.cat([part.flatten() for part in parts])


def test_the_vocabulary_survives_every_tokenizer(model):
    words = vocabulary(model)
    assert {"cat", "church", "gogh"} <= set(words.words)
    for key, tokenizer in tokenizers(model).items():
        for row in (0, len(words) // 2, len(words) - 1):
            ids = tokenizer(words.words[row], add_special_tokens=False).input_ids
            assert ids == [int(words.ids[key][row])]


def test_copies_have_the_same_vocabulary(model):
    # Copies of CLIP tokenizers decode differently.
    assert vocabulary(copy.deepcopy(model)).words == vocabulary(model).words


def test_the_vector_of_a_word_in_place_of_another_reads_as_that_word(model):
    soft = SoftTokens(model, avoid=["a photo of cat"])
    assert soft.text not in ("a", "photo", "of", "cat")
    with soft.injected(soft.initial("cat")), torch.no_grad():
        found = model.encode([f"a photo of {soft.text}"])
    wanted = model.encode(["a photo of cat"])
    if model.kind == "flux":
        # Its tiny CLIP pools at the highest id, which is the end token in both.
        assert torch.allclose(found.pooled, wanted.pooled, atol=1e-6)
    assert torch.allclose(flat(found), flat(wanted), atol=1e-6)
    plain = model.encode([f"a photo of {soft.text}"])
    assert not torch.allclose(flat(plain), flat(wanted), atol=1e-3)


def test_several_tokens_stand_in_order(model):
    soft = SoftTokens(model, 2, avoid=["red cat"])
    words = vocabulary(model)
    rows = word_rows(model, words)
    places = [words.words.index("red"), words.words.index("cat")]
    with soft.injected({key: value[places] for key, value in rows.items()}), torch.no_grad():
        found = model.encode([soft.text])
    assert torch.allclose(flat(found), flat(model.encode(["red cat"])), atol=1e-6)


def test_gradients_reach_the_vectors_of_every_encoder(model):
    soft = SoftTokens(model, avoid=["a"])
    vectors = {key: value.requires_grad_(True) for key, value in soft.initial().items()}
    assert set(vectors) == set(model.text_encoders)
    with soft.injected(vectors):
        embedding = model.encode([f"a {soft.text}"])
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    loss = model.predict(noise, torch.tensor([500.0]), embedding).square().mean()
    for key, grad in zip(vectors, torch.autograd.grad(loss, list(vectors.values())), strict=True):
        assert grad.abs().max() > 0, key
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_left_behind_even_after_an_exception(model):
    before = state_hash(model)
    text = model.encode(["a cat"])
    soft = SoftTokens(model, avoid=["a cat"])
    with pytest.raises(ZeroDivisionError), soft.injected(soft.initial()):
        model.encode([f"a {soft.text}"])
        raise ZeroDivisionError
    assert state_hash(model) == before
    assert torch.equal(flat(model.encode(["a cat"])), flat(text))
    # Transformers leaves hooks of its own, but none at embeddings.
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert embeddings and not any(module._forward_hooks for module in embeddings)


def test_a_placeholder_must_stay_a_word(model):
    soft = SoftTokens(model, avoid=["a photo of"])
    assert soft.readable(f"a photo of {soft.text}")
    assert not soft.readable(f"a photo of {soft.text}ish")
    assert not soft.readable(f"{soft.text} and {soft.text}")


def test_too_many_tokens_for_the_vocabulary():
    model = DiffusionGenerator(tiny_pipeline("sd"))
    with pytest.raises(ModelError, match="use fewer tokens"):
        SoftTokens(model, 10_000)


def test_an_encoder_that_bypasses_its_embeddings_is_noticed():
    model = DiffusionGenerator(tiny_pipeline("flux"))
    encoder = model.text_encoders["text_encoder_2"]
    encoder.encoder.embed_tokens = copy.deepcopy(encoder.encoder.embed_tokens)
    soft = SoftTokens(model)
    with (
        pytest.raises(ModelError, match="text_encoder_2 did not use"),
        soft.injected(soft.initial()),
    ):
        model.encode([soft.text])
