"""Embeddings equal those of each text alone, without padding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, BertConfig, LlamaConfig, RobertaConfig

from computron.errors import BadRequest, ContextTooLong, ExecutionFailed, SwapFailed
from computron.execution.requests import EmbedJob

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 110,
    "initializer_range": 0.3,
}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, pad_token_id=0),
    "roberta": lambda: RobertaConfig(**SIZES, pad_token_id=1),
    "llama": lambda: LlamaConfig(**SIZES, pad_token_id=None, num_key_value_heads=2),
}


class FailingGate:
    is_open = False

    def wait(self, segment: int, stream: int = 0) -> None:
        raise SwapFailed("the link is down")


def pooled(model, tokens: list[int], pooling: str, normalized: bool) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return vector / vector.norm() if normalized else vector


@pytest.fixture
def embedder(random_checkpoint, load, new_rig):
    def make(name: str = "bert", **settings):
        model, folder = random_checkpoint(AutoModel, CONFIGS[name]())
        return model, new_rig(load(folder, task="embed", **settings))

    return make


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("pooling", "normalized"), [("mean", True), ("cls", False), ("last", True)])
def test_a_batch_gives_what_each_text_gives_alone(name, pooling, normalized, embedder, prompts) -> None:
    model, one = embedder(name, pooling=pooling, normalize=normalized, max_batch_size=6, max_batch_tokens=150)
    texts = [[token % 290 + 2 for token in prompt] for prompt in prompts]
    answers = one.run([EmbedJob(tuple(text)) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        (output,) = answer.outputs
        expected = pooled(model, text, pooling, normalized)
        assert torch.allclose(torch.tensor(output.embedding), expected, atol=1e-5, rtol=1e-5)


def test_a_step_answers_every_request(embedder) -> None:
    _, one = embedder(max_batch_size=2)
    requests = [one.add(EmbedJob((5,) * length)) for length in (3, 1, 9, 3, 2)]
    result = one.step(requests)
    assert sorted(result.finished) == requests
    assert (result.batch_size, result.tokens, result.cache_blocks) == (5, 18, {})
    assert one.step(requests).outputs == []


def test_a_dropped_request_is_not_run(embedder) -> None:
    _, one = embedder()
    first, second = one.add(EmbedJob((1, 2))), one.add(EmbedJob((3,)))
    one.executor.drop(first)
    one.executor.drop(first)
    assert one.step([first, second]).finished == (second,)


def test_a_step_whose_swap_fails_can_be_tried_again(embedder) -> None:
    _, one = embedder()
    request = one.add(EmbedJob((1, 2, 3)))
    with pytest.raises(SwapFailed, match="the link is down"):
        one.step([request], FailingGate())
    assert one.step([request]).finished == (request,)


def test_an_exception_of_the_model_fails_the_step_in_its_own_words(embedder, monkeypatch) -> None:
    _, one = embedder()
    request = one.add(EmbedJob((1, 2, 3)))

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("no weights today")

    monkeypatch.setattr(one.model.module.encoder, "forward", broken)
    with pytest.raises(ExecutionFailed, match="ZeroDivisionError: no weights today"):
        one.step([request])


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [((), BadRequest, "empty"), ((300,), BadRequest, "token id 300"), ((1,) * 111, ContextTooLong, "111 tokens")],
)
def test_what_cannot_be_embedded_is_refused_with_the_reason(embedder, tokens, error, words) -> None:
    _, one = embedder()
    with pytest.raises(error, match=words):
        one.executor.prepare(EmbedJob(tokens))


def test_other_kinds_of_jobs_are_refused(embedder, greedy) -> None:
    _, one = embedder()
    with pytest.raises(BadRequest, match="embeddings"):
        one.executor.prepare(greedy((1,)))


@pytest.mark.models
def test_minilm_gives_what_transformers_gives(demo, load, new_rig) -> None:
    one = new_rig(load(demo.minilm, task="embed"))
    model = AutoModel.from_pretrained(demo.minilm).eval()
    texts = ["A swap.", "Weights are read-only, so eviction is free.", "cats", "What is the capital of France? " * 4]
    tokens = [one.model.encode(text) for text in texts]
    answers = one.run([EmbedJob(tuple(each)) for each in tokens])
    for each, answer in zip(tokens, answers, strict=True):
        expected = pooled(model, each, "mean", True)
        assert torch.allclose(torch.tensor(answer.outputs[0].embedding), expected, atol=1e-5)
