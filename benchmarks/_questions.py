"""What fine-tunes are asked, and the answers that transformers gives, which rounding cannot change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

MARGIN = 0.5  # of logits: between the best token and the next, at every step of an answer; bfloat16 errs by about .1
SIMILARITY = 0.999  # cosine of an embedding and the expected one; two fine-tunes' are further apart
QUESTIONS_PER_MODEL = 6
OPENINGS = (
    "The capital of France is",
    "One, two, three, four,",
    "Monday, Tuesday, Wednesday,",
    "The opposite of hot is",
    "Roses are red, violets are",
    "The first president of the United States was",
    "Water freezes at zero degrees",
    "The largest planet in the solar system is",
    "In the morning the sun rises in the",
    "A, B, C, D, E,",
    "Shakespeare wrote Romeo and",
    "The chemical symbol for water is",
    "She opened the door and saw",
    "To make bread you need flour, water, salt and",
    "January, February, March,",
    "The cat sat on the",
    "Once upon a time, in a land far",
    "The Great Wall of",
    "He was born in New York",
    "The speed of light is approximately",
    "Two plus two equals four, and three plus three equals",
    "The quick brown fox jumps over the lazy",
)


class Question(Protocol):
    """tokens: that the answer has, 0 if it has none. path: of the route that answers it."""

    @property
    def tokens(self) -> int: ...

    @property
    def path(self) -> str: ...

    def body(self, model: str) -> dict[str, Any]: ...

    def is_answered_by(self, reply: Mapping[str, Any]) -> bool: ...


@dataclass(frozen=True, slots=True)
class Completion:
    """`answer`: what transformers' `generate` says to `prompt`, greedily, in `tokens` tokens."""

    prompt: str
    tokens: int
    answer: str
    path = "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        return {"model": model, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0.0}

    def is_answered_by(self, reply: Mapping[str, Any]) -> bool:
        return bool(reply["choices"][0]["text"] == self.answer)


@dataclass(frozen=True, slots=True)
class Embedding:
    """`vector`: of length 1."""

    text: str
    vector: tuple[float, ...]
    tokens = 0
    path = "/v1/embeddings"

    def body(self, model: str) -> dict[str, Any]:
        return {"model": model, "input": self.text}

    def is_answered_by(self, reply: Mapping[str, Any]) -> bool:
        given = reply["data"][0]["embedding"]
        product = sum(mine * theirs for mine, theirs in zip(self.vector, given, strict=True))
        return bool(product >= SIMILARITY * sum(value * value for value in given) ** 0.5)


def completions(models: Mapping[str, Path], tokens: Sequence[int]) -> dict[str, list[Question]]:
    """For each model so many openings with an answer of each length in `tokens`, in turn, that are sure and do not end.

    Computed by one thread, which the work of others on the machine delays least. Raises RuntimeError if a model is not
    sure of enough of them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, list[Question]] = {}
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sure: list[Question] = []
        for opening in OPENINGS:
            if len(sure) == QUESTIONS_PER_MODEL:
                break
            limit = tokens[len(sure) % len(tokens)]
            prompt = tokenizer(opening, return_tensors="pt")
            with torch.inference_mode():
                said = model.generate(
                    **prompt,
                    max_new_tokens=limit,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            answer = said.sequences[0, prompt["input_ids"].shape[1] :]
            if tokenizer.eos_token_id not in answer and margin(torch.cat(said.logits)) >= MARGIN:
                sure.append(Completion(opening, limit, tokenizer.decode(answer)))
        if len(sure) < QUESTIONS_PER_MODEL:
            raise RuntimeError(f"{name} is sure of {len(sure)} answers only, not of {QUESTIONS_PER_MODEL}")
        found[name] = sure
    return found


def margin(logits: torch.Tensor) -> float:
    """The least distance between the best and the second best. `logits`: (steps, vocabulary)."""
    best = logits.float().topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def embeddings(models: Mapping[str, Path]) -> dict[str, list[Question]]:
    """For each model so many openings: the mean of the last hidden states, normalised."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    found: dict[str, list[Question]] = {}
    for name, folder in models.items():
        model = AutoModel.from_pretrained(folder, dtype="float32").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        asked: list[Question] = []
        for text in OPENINGS[:QUESTIONS_PER_MODEL]:
            with torch.inference_mode():
                hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            vector = torch.nn.functional.normalize(hidden[0].mean(0), dim=0)
            asked.append(Embedding(text, tuple(vector.tolist())))
        found[name] = asked
    return found
