"""How large the calls are that a model is measured with, and what the steps hold that such a call takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from computron.profiling.fit import Work

BATCHES = (1, 2, 4, 8, 16)
PROMPTS = (16, 128)  # tokens
OUTPUTS = (1, 12)  # tokens; of a model that generates


@dataclass(frozen=True, slots=True)
class Shape:
    """A call of `batch` requests at once, each with so many tokens; 0 prompt tokens: it is no text."""

    batch: int
    prompt_tokens: int
    output_tokens: int = 1

    @property
    def name(self) -> str:
        words = [f"{self.batch} x"]
        words += [f"{self.prompt_tokens} tokens"] if self.prompt_tokens else ["request"]
        words += [f"and {self.output_tokens} more"] if self.output_tokens > 1 else []
        return " ".join(words)

    @property
    def steps(self) -> int:
        """The first request starts at once and alone; the others join the step after it, and end one step later."""
        return self.output_tokens + (self.batch > 1)

    def work(self, steps: int) -> Work:
        """What so many steps held: the first of each request reads its prompt, the others have it in the cache."""
        later = self.output_tokens - 1
        context = later * self.prompt_tokens + later * (later + 1) // 2
        return Work(
            steps=steps,
            openings=1 + (self.batch > 1),
            prompt_tokens=self.batch * self.prompt_tokens,
            sequences=self.batch * self.output_tokens,
            context_tokens=self.batch * context,
        )


def shapes_for(task: str, max_batch_size: int, max_model_len: int | None, step_tokens: int) -> list[Shape]:
    """Calls whose prompts are read in one step, of at most `step_tokens` together; `task`: of a model that reads text,
    or "other".
    """
    # One request runs alone before the others: with one more than a power of two their step is of that size.
    batches = [1, *(size + 1 for size in BATCHES if size <= max_batch_size)]
    if task == "other":
        return [Shape(batch, 0) for batch in batches]
    longest = max_model_len or max(PROMPTS)
    outputs = OUTPUTS if task == "generate" else (1,)
    return [
        Shape(batch, prompt, output)
        for batch, prompt, output in product(batches, PROMPTS, outputs)
        if prompt + output <= longest and batch * prompt <= step_tokens and (output == 1 or batch <= max_batch_size)
    ]
