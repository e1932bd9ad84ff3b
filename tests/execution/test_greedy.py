"""Greedy tokens are transformers.generate's, however the work is cut up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from computron.execution.requests import Output, TextOutput

FAMILIES = ["llama", "opt", "gpt2", "qwen2", "gemma2", "mistral"]


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs if isinstance(output, TextOutput) for token in output.tokens]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_each_prompt_alone_gives_the_reference_tokens(family_name, rig, greedy, prompts, reference) -> None:
    one = rig(family_name)
    for prompt in prompts:
        assert tokens_of(one.run([greedy(prompt)])[0]) == reference(family_name, prompt)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_all_prompts_together_give_the_reference_tokens(family_name, rig, greedy, prompts, reference) -> None:
    outputs = rig(family_name, max_batch_size=20).run([greedy(prompt) for prompt in prompts])
    assert [tokens_of(each) for each in outputs] == [reference(family_name, prompt) for prompt in prompts]
