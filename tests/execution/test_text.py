from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from computron.execution.text import Detokenizer, StopStrings
from computron.models.byte_tokenizer import byte_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = ["hello world, hello words", "naïve café, 漢字かな 🙂🙃", "def f(x):\n    return x ** 2\n", "ääöö ßß"] * 5


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: spaces as a sign of their own, unknown characters as bytes."""
    words = ["▁", "▁hello", "▁world", "hel", "lo", "▁the", "s", "e", "<s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(words + [f"<0x{byte:02X}>" for byte in range(256)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", "hello", "world", "##s", "##ing", "go", ",", "the"]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback(), "word pieces": word_pieces()}


def decoder(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte level", "word pieces"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_together_are_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25))
    stream = Detokenizer(decoder(tokenizer))
    text = "".join(stream.append(token) for token in tokens) + stream.finish()
    whole = tokenizer.decode(tokens)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {REPLACEMENT}


# One wrong byte makes this decoder take back the characters before it, so random tokens have no certain text.
@given(text=st.text(max_size=12), data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_of_bytes_together_are_the_whole_text(text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    tokens = tokenizer.encode(text).ids
    stream = Detokenizer(decoder(tokenizer))
    pieces = [stream.append(token) for token in tokens]
    whole = tokenizer.decode(tokens)
    assert "".join(pieces) + stream.finish() == whole.rstrip(REPLACEMENT)
    assert whole.startswith("".join(pieces[: data.draw(st.integers(0, len(pieces)))]))


@given(text=st.text(max_size=20))
@example("🙂🙃 漢字")
@settings(max_examples=100, deadline=None)
def test_a_character_of_several_tokens_comes_whole(text: str) -> None:
    tokenizer = byte_tokenizer(256)
    stream = Detokenizer(lambda tokens: tokenizer.decode(tokens))
    pieces = [stream.append(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)


def test_half_a_character_at_the_end_is_never_shown() -> None:
    tokenizer = byte_tokenizer(256)
    stream = Detokenizer(lambda tokens: tokenizer.decode(tokens))
    pieces = [stream.append(token) for token in tokenizer.encode("a🙂")[:-1]]
    assert "".join(pieces) + stream.finish() == "a"


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    tokenizer = byte_tokenizer(256)
    tokens = tokenizer.encode("say 🙂!")
    stream = Detokenizer(lambda tokens: tokenizer.decode(tokens), tokens[:5])
    assert "".join(stream.append(token) for token in tokens[5:]) == "🙂!"


def test_the_space_between_prompt_and_answer_is_kept() -> None:
    tokenizer = byte_fallback()
    hello, world = (tokenizer.token_to_id(token) for token in ("▁hello", "▁world"))
    assert Detokenizer(decoder(tokenizer), [hello]).append(world) == " world"


def cut(text: str, stops: Sequence[str], keep: bool) -> tuple[str, str | None]:
    """The definition: the stop string that is complete first ends the text; of several, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop and stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if keep else end - len(stop)], stop


@given(
    pieces=st.lists(st.text("ab<", max_size=4), max_size=12),
    stops=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
)
@example(["a", "a", "b"], ["aab"], False)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_however_the_text_comes(pieces: list[str], stops: list[str], keep: bool) -> None:
    watcher = StopStrings(stops, keep=keep)
    text = ""
    for piece in pieces:
        text += watcher.append(piece)
        if watcher.found is not None:
            break
    else:
        text += watcher.finish()
    assert (text, watcher.found) == cut("".join(pieces), stops, keep)


@given(pieces=st.lists(st.text("ab", min_size=1, max_size=3), max_size=8), stop=st.text("ab", min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_nothing_that_a_stop_string_would_take_back_has_left(pieces: list[str], stop: str) -> None:
    watcher = StopStrings([stop], keep=False)
    sent = ""
    for position, piece in enumerate(pieces):
        sent += watcher.append(piece)
        if watcher.found is not None:
            return
        held = "".join(pieces[: position + 1])[len(sent) :]
        assert held == "" or stop.startswith(held)


def test_a_stop_string_before_the_least_length_does_not_count() -> None:
    watcher = StopStrings(["end"], keep=False)
    assert watcher.append("the end, en", armed=False) == "the end, en"
    assert watcher.append("d") == "d"
    assert watcher.found is None
