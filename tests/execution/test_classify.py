"""Probabilities equal those of each input alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ViTConfig,
)

from computron.errors import BadRequest
from computron.execution.requests import ClassifyJob, EmbedJob

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_labels": 3,
}
CONFIGS = {
    "bert": lambda **more: BertConfig(**SIZES, pad_token_id=0, **more),
    "llama": lambda **more: LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=299, **more),
    "llama without padding": lambda **more: LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=None, **more),
}


@pytest.fixture
def text_classifier(random_checkpoint, load, new_rig):
    def make(name: str, **more):
        model, folder = random_checkpoint(AutoModelForSequenceClassification, CONFIGS[name](**more))
        return model, new_rig(load(folder, task="classify", max_batch_size=8))

    return make


@pytest.fixture
def image_classifier(random_checkpoint, load, new_rig):
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model, folder = random_checkpoint(AutoModelForImageClassification, config)
    return model, new_rig(load(folder, task="classify", max_batch_size=4))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("several", [False, True])
def test_texts(name, several, text_classifier, prompts) -> None:
    more = {"problem_type": "multi_label_classification"} if several else {}
    model, one = text_classifier(name, **more)
    texts = [[token % 290 + 2 for token in prompt] for prompt in prompts]
    answers = one.run([ClassifyJob(tokens=tuple(text)) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([text])).logits[0]
        expected = torch.sigmoid(logits) if several else torch.softmax(logits, -1)
        assert torch.allclose(torch.tensor(answer.outputs[0].probabilities), expected, atol=1e-5)


def test_images(image_classifier) -> None:
    model, one = image_classifier
    images = torch.randn((6, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    answers = one.run([ClassifyJob(pixels=image) for image in images])
    with torch.inference_mode():
        expected = torch.softmax(model(pixel_values=images).logits, -1)
    given = torch.tensor([answer.outputs[0].probabilities for answer in answers])
    assert torch.allclose(given, expected, atol=1e-5)


def test_the_wrong_kind_of_input_is_refused(image_classifier, text_classifier) -> None:
    _, images = image_classifier
    _, texts = text_classifier("bert")
    with pytest.raises(BadRequest, match="classifies images"):
        images.executor.prepare(ClassifyJob(tokens=(1, 2)))
    with pytest.raises(BadRequest, match="classifies images"):
        images.executor.prepare(ClassifyJob(pixels=torch.zeros(3)))
    with pytest.raises(BadRequest, match="classifies text"):
        texts.executor.prepare(ClassifyJob(pixels=torch.zeros((3, 16, 16))))
    with pytest.raises(BadRequest, match="empty"):
        texts.executor.prepare(ClassifyJob(tokens=()))
    with pytest.raises(BadRequest, match="classifies"):
        texts.executor.prepare(EmbedJob((1,)))
