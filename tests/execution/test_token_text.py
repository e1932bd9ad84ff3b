"""Tokenizers of every kind give the same text as a whole and in pieces."""

from __future__ import annotations

from types import SimpleNamespace

from transformers import ByT5Tokenizer

from computron.execution.sampling import Ranked
from computron.execution.text import Detokenizer
from computron.execution.token_text import TokenText
from computron.models.byte_tokenizer import byte_tokenizer


def token_text(tokenizer) -> TokenText:
    return TokenText(SimpleNamespace(tokenizer=tokenizer, eos_token_ids=frozenset({1})))


def test_a_tokenizer_written_in_python_streams_whole_characters() -> None:
    tokenizer = ByT5Tokenizer()
    tokens = tokenizer.encode("né 🙂!")
    stream = Detokenizer(token_text(tokenizer).decoder(skip_special_tokens=True))
    pieces = [stream.append(token) for token in tokens]
    assert [piece for piece in pieces if piece] == ["n", "é", " ", "🙂", "!"]
    assert stream.finish() == ""


def test_special_tokens_are_kept_if_asked() -> None:
    tokenizer = ByT5Tokenizer()
    tokens = tokenizer.encode("a")
    text = token_text(tokenizer)
    assert text.decoder(skip_special_tokens=True)(tokens) == "a"
    assert text.decoder(skip_special_tokens=False)(tokens) == "a</s>"


def test_log_probabilities_carry_the_text_of_their_tokens() -> None:
    tokenizer = byte_tokenizer(300)
    a, b = tokenizer.encode("ab")
    described = token_text(tokenizer).describe(Ranked(a, -0.5, ((a, -0.5), (b, -1.5))))
    assert (described.text, described.top) == ("a", ((a, "a", -0.5), (b, "b", -1.5)))
