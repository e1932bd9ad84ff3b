"""A node's part of generation: the forward passes of a step over the paged cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from computron.execution.attention import IMPLEMENTATION
from computron.execution.attention_plan import AttentionPlan
from computron.execution.batching import execution_error
from computron.execution.host_linear import speed_up_linears
from computron.execution.kv_cache import KVCache
from computron.execution.sampling import likeliest
from computron.execution.steps import GenerateStep, LogitsOutput, StepInput, TokenBatch, TokensOutput
from computron.models import Gate, LoadedModel


class GenerateRunner:
    """Runs `GenerateStep`s. `cache`: flat uint8, the whole virtual range of this node's KV cache."""

    def __init__(self, model: LoadedModel, cache: torch.Tensor) -> None:
        assert model.plan.cache is not None, "a model that generates has a cache"
        module = model.module
        assert isinstance(module, PreTrainedModel), "what generates is a transformers model"
        module.set_attn_implementation(IMPLEMENTATION)
        if model.device.type == "cpu":
            speed_up_linears(module)
        self._model = model
        self._cache = KVCache(model.plan.cache, cache)
        self._windows: set[int | None] = set()  # what the layers have asked for

    @property
    def block_bytes(self) -> int:
        return self._cache.block_bytes

    @property
    def capacity(self) -> int:
        return self._cache.capacity

    def move_cache(self, moves: Mapping[int, int]) -> None:
        if moves:
            self._cache.move(moves)

    @torch.inference_mode()
    def run(self, step: StepInput, gate: Gate) -> TokensOutput | LogitsOutput | None:
        assert isinstance(step, GenerateStep), "what generates runs no other steps"
        try:
            self._model.gate = gate
            if len(step.cleared):
                self._cache.clear(step.cleared)
            given = [self._run(part, step.greedy) for part in step.parts]
            return self._output([each for each in given if each is not None], step.greedy)
        except Exception as error:
            raise execution_error(error) from error

    def _run(self, part: TokenBatch, greedy: bool) -> torch.Tensor | None:
        """The part's share of the output, on the device; None where there is none."""
        logits = self._forward(part)
        if logits is None or not self._model.plan.shard.gives_result:
            return None
        return likeliest(logits) if greedy else logits

    def _forward(self, part: TokenBatch) -> torch.Tensor | None:
        """Write the keys and values of the part's tokens. Gives the logits of its rows, [rows, vocabulary]."""
        # Without a row that is wanted the head would have no input: it gets one, whose logits nobody reads.
        rows = part.rows if len(part.rows) else np.zeros(1, np.int64)
        plan = AttentionPlan(self._cache, part, self._windows, [part.tokens[None], rows])
        input_ids, kept = plan.extras
        output = self._model.forward(
            input_ids=input_ids,
            position_ids=plan.positions[None],
            use_cache=False,
            logits_to_keep=kept,
            attention_plan=plan,
        )
        if output is None:
            return None
        logits: torch.Tensor = output.logits[0]
        return logits[: len(part.rows)]

    def _output(self, given: list[torch.Tensor], greedy: bool) -> TokensOutput | LogitsOutput | None:
        if not given:
            return None
        joined = given[0] if len(given) == 1 else torch.cat(given)
        if greedy:
            return TokensOutput(joined.cpu().numpy())
        # The node that plans is the one that has the logits, unless there are several stages.
        return LogitsOutput(joined if self._model.plan.shard.pipeline_parallel == 1 else joined.cpu())
