"""A tokenizer for models that know no text: one token a byte, and a name for every other id of the vocabulary."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes; a larger id decodes to its number. Smaller vocabularies lack the last bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocabulary]
    tokens = {character: index for index, character in enumerate(alphabet)}
    tokens |= {f"<{index}>": index for index in range(len(tokens), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapper: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = wrapper(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    return result
