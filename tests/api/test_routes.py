"""The routes that are Computron's own, and those for whoever watches the server."""

from __future__ import annotations

import base64

import pytest

from computron.node.snapshot import NodeState

IMAGE = base64.b64encode(b"image bytes").decode()


@pytest.mark.parametrize(
    ("model", "body", "count", "tokens"),
    [
        ("texts", {"input": "ab"}, 1, 2),
        ("texts", {"input": ["ab", "c"]}, 2, 3),
        ("texts", {"input": [[1, 2], [3]]}, 2, 3),
        ("images", {"image": IMAGE}, 1, 0),
        ("images", {"image": f"data:image/png;base64,{IMAGE}"}, 1, 0),
        ("images", {"image": [IMAGE, IMAGE]}, 2, 0),
    ],
)
async def test_classify_names_the_likeliest_labels(server, model, body, count, tokens):
    status, answer, _ = await server.post("/v1/classify", {"model": model, "top_k": 2, **body})
    assert status == 200
    assert [item["index"] for item in answer["data"]] == list(range(count))
    assert answer["data"][0] == {
        "index": 0,
        "label": "dog",
        "top": [{"label": "dog", "probability": 0.7}, {"label": "cat", "probability": 0.2}],
        "probs": [0.2, 0.7, 0.1],
        "num_classes": 3,
    }
    assert answer["usage"]["prompt_tokens"] == tokens


async def test_images_reach_the_model_as_its_processor_made_them(server):
    await server.post("/v1/classify", {"model": "images", "image": IMAGE})
    assert server.node.submitted[0].job.pixels == b"image bytes"


async def test_a_custom_model_gets_the_body_and_gives_any_json(server):
    status, answer, _ = await server.post("/v1/models/team/echo/infer", {"x": [1, {"y": None}]})
    assert (status, answer["object"], answer["model"]) == (200, "inference", "team/echo")
    assert answer["output"] == {"x": [1, {"y": None}]}


async def test_a_custom_model_may_answer_with_arrays(server):
    import numpy

    from computron.execution.requests import CustomOutput

    async def arrays(submitted) -> None:
        submitted.put(CustomOutput(0, {"a": numpy.arange(2), "b": numpy.float32(0.5)}))
        submitted.finish()

    server.node.script = arrays
    _, answer, _ = await server.post("/v1/models/team/echo/infer", {})
    assert answer["output"] == {"a": [0, 1], "b": 0.5}


async def test_an_answer_that_json_cannot_carry_is_the_models_fault(server):
    from computron.execution.requests import CustomOutput

    async def unwritable(submitted) -> None:
        submitted.put(CustomOutput(0, object()))
        submitted.finish()

    server.node.script = unwritable
    status, answer, _ = await server.post("/v1/models/team/echo/infer", {})
    assert (status, answer["error"]["code"]) == (500, "execution_failed")
    assert "object cannot be written as JSON" in answer["error"]["message"]


async def test_an_operator_loads_and_unloads_models(server):
    status, answer, _ = await server.post("/v1/models/chat/load", b"")
    assert (status, answer["id"], answer["state"]) == (202, "chat", "partial")
    status, answer, _ = await server.post("/v1/models/team/echo/unload", b"")
    assert (status, answer["id"]) == (202, "team/echo")
    assert server.node.orders == [("load", "chat"), ("unload", "team/echo")]


async def test_tokenize_and_detokenize_are_inverse(server):
    body = {"model": "chat", "prompt": "hé", "return_token_strs": True}
    _, answer, _ = await server.post("/tokenize", body)
    assert answer == {"count": 2, "max_model_len": 100, "tokens": [104, 233], "token_strs": ["h", "é"]}
    _, answer, _ = await server.post("/detokenize", {"model": "chat", "tokens": [104, 233]})
    assert answer == {"prompt": "hé"}


async def test_tokenize_renders_chats(server):
    _, answer, _ = await server.post("/tokenize", {"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
    assert answer["count"] == len("user: hi\n")


@pytest.mark.parametrize(
    ("state", "healthy", "ready"),
    [
        (NodeState.STARTING, 200, 503),
        (NodeState.READY, 200, 200),
        (NodeState.DRAINING, 200, 503),
        (NodeState.FAILED, 503, 503),
    ],
)
async def test_health_tells_alive_from_ready(server, state, healthy, ready):
    server.node.state = state
    status, answer = await server.get("/health")
    assert (status, answer["status"]) == (healthy, state.value)
    assert (answer["reason"] is not None) == (state is NodeState.FAILED)
    assert (await server.get("/health/ready"))[0] == ready


async def test_the_version_is_told(server):
    status, answer = await server.get("/version")
    assert status == 200
    assert answer["version"]


async def test_metrics_have_their_fixed_names(server):
    metrics = server.metrics
    metrics.request_finished("chat", "ok", 0.1)
    metrics.first_token("chat", 0.05)
    metrics.inter_token("chat", 0.01)
    metrics.step("chat", 4, 0.02)
    metrics.swap_finished("chat", 0.2, 0.5, 1000)
    metrics.swap_in_completed("chat")
    metrics.eviction("chat", "demand", 3)
    await server.post("/v1/chat/completions", {"model": "chat", "messages": []})
    status, text = await server.get("/metrics")
    assert status == 200
    for line in (
        'computron_requests_total{model="chat",outcome="ok"} 1.0',
        'computron_requests_total{model="chat",outcome="invalid"} 1.0',
        'computron_request_seconds_count{model="chat"} 1.0',
        'computron_time_to_first_token_seconds_count{model="chat"} 1.0',
        'computron_inter_token_seconds_count{model="chat"} 1.0',
        'computron_batch_size_sum{model="chat"} 4.0',
        'computron_step_seconds_sum{model="chat"} 0.02',
        'computron_swap_ins_total{model="chat"} 1.0',
        'computron_swap_in_seconds_sum{model="chat"} 0.2',
        'computron_swap_hidden_ratio_sum{model="chat"} 0.5',
        'computron_swap_in_bytes_total{model="chat"} 1000.0',
        'computron_evictions_total{model="chat",reason="demand"} 1.0',
        'computron_evicted_pages_total{model="chat",reason="demand"} 3.0',
        'computron_queue_depth{model="chat"} 3.0',
        'computron_model_resident_ratio{model="team/echo"} 0.25',
        'computron_device_memory_bytes{node="0",state="free"} 10.0',
        'computron_host_memory_bytes{node="0",state="used"} 20.0',
        'computron_transfer_bytes_total{node="0"} 77.0',
        "computron_pages_shared_total 5.0",
        'computron_swaps_total{node="0",outcome="failed"} 2.0',
        'computron_swaps_total{node="0",outcome="cancelled"} 1.0',
        'computron_link_busy_seconds_total{node="0"} 1.5',
        "computron_host_pages_on_disk 6.0",
        "computron_device_frames 32.0",
        "computron_page_bytes 128.0",
        "computron_pipeline_stages 1.0",
    ):
        assert line in text.splitlines()
