"""A call may have more jobs than the model's queue takes."""

from __future__ import annotations

from dataclasses import replace

import pytest


@pytest.mark.parametrize(("settings", "most"), [({"max_batch_size": 4}, 8), ({"max_queue": 3}, 3), ({}, 32)])
async def test_jobs_are_queued_as_earlier_ones_end(server, settings, most):
    plan = server.node.models["embed"].plan
    plan.config = replace(plan.config, **settings)
    inputs = ["a" * (1 + index % 7) for index in range(100)]
    status, answer, _ = await server.post("/v1/embeddings", {"model": "embed", "input": inputs})
    assert status == 200
    assert [item["embedding"][1] for item in answer["data"]] == [len(text) for text in inputs]
    assert server.node.most_open == most


async def test_a_stream_of_many_answers_is_whole(server):
    plan = server.node.models["chat"].plan
    plan.config = replace(plan.config, max_queue=2)
    async with server.client as client:
        stream = await client.completions.create(model="chat", prompt=["a", "b"], n=10, stream=True)
        ended = [chunk.choices[0].index async for chunk in stream if chunk.choices[0].finish_reason]
    assert sorted(ended) == list(range(20))


async def test_the_deadline_of_later_jobs_is_the_calls(server):
    plan = server.node.models["embed"].plan
    plan.config = replace(plan.config, max_queue=1)
    await server.post("/v1/embeddings", {"model": "embed", "input": ["a", "b", "c"]}, X_Computron_Deadline_Ms="60000")
    first, *later = [submitted.deadline for submitted in server.node.submitted]
    assert first == 60.0
    assert all(deadline < first for deadline in later)


async def test_a_job_that_is_refused_later_fails_the_call_and_cancels_the_others(server):
    from computron.errors import QueueFull

    plan = server.node.models["embed"].plan
    plan.config = replace(plan.config, max_queue=2)
    accept = server.node.submit

    def refuse_the_fifth(model, job, **options):
        if len(server.node.submitted) == 4:
            raise QueueFull("full", retry_after=2.0)
        return accept(model, job, **options)

    server.node.submit = refuse_the_fifth
    status, answer, _ = await server.post("/v1/embeddings", {"model": "embed", "input": ["a"] * 9})
    assert (status, answer["error"]["code"]) == (503, "queue_full")
