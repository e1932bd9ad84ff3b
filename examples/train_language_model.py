"""A language model of three million parameters, trained by several workers through the Parameter Service.

    python examples/train_language_model.py            # starts the service and two workers; takes a minute or two
    python examples/train_language_model.py --plain    # the same steps with torch.optim, in one process

`train` is an ordinary PyTorch loop: the two lines marked with arrows are all that the Parameter Service asks for. Both
commands end with a digest of the parameters, and it is the same: what the workers' gradients become in the service is
bit for bit what one process computes that adds them up in the order of ranks.

The text is the manual of the language that comes with every Python (`help("topics")`); --text names another file.
Workers can also be started by hand or by torchrun, on any machine: `environment` shows what variables they need.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import hashlib
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SYMBOLS = 256  # the model reads and writes bytes
WIDTH, HEADS, LAYERS, CONTEXT = 256, 4, 4, 128
BATCH = 4  # sequences a worker and step
LEARNING_RATE, WARM_UP = 1e-3, 40  # steps
HELD_OUT = 0.05  # of the text
REPORT_EVERY = 20  # steps


class Layer(nn.Module):
    """Causal self-attention and a feed-forward part, each after a norm and around it a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return torch.add(x, self.feed_forward(x))


class LanguageModel(nn.Module):
    """Bytes [batch, length] to the scores of each next byte [batch, length, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols) + self.positions[: symbols.shape[1]]
        scores: Tensor = self.head(self.norm(self.layers(x)))
        return scores

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean over all bytes but the first of each sequence, in nats."""
        return F.cross_entropy(self(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


def train(options: argparse.Namespace, rank: int) -> None:
    """What each worker does."""
    from computron.parameter_service import AdamW  # <-- instead of: from torch.optim import AdamW

    text = Text(options.text)
    model = LanguageModel()
    optimizer = AdamW(model.named_parameters(), lr=LEARNING_RATE)  # <-- the same line; `environment` says which job
    rate = learning_rate(options.steps)
    report = Report(model, text, shown=rank == 0)
    while (step := optimizer.steps) < options.steps:  # of the job, which may have been trained before
        report.before(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        model.loss(text.batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    report.end(options.steps)


def train_plain(options: argparse.Namespace) -> None:
    """What all workers do together, in one process: the reference."""
    text = Text(options.text)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=LEARNING_RATE, fused=True)
    rate = learning_rate(options.steps)
    report = Report(model, text, shown=True)
    for step in range(options.steps):
        report.before(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        for rank in range(options.workers):
            model.loss(text.batch(step, rank)).backward()  # adds to what the ranks before have left
        for parameter in model.parameters():
            parameter.grad = parameter.grad / options.workers if parameter.grad is not None else None
        optimizer.step()
        optimizer.zero_grad()
    report.end(options.steps)


class Text:
    """Bytes to learn from, and some from the end to be judged by."""

    def __init__(self, path: Path | None) -> None:
        text = path.read_bytes() if path else manual()
        if len(text) * HELD_OUT < 2 * CONTEXT:
            raise SystemExit(f"{path} is too short: give at least {math.ceil(2 * CONTEXT / HELD_OUT)} bytes")
        symbols = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        end = int(len(symbols) * (1 - HELD_OUT))
        self._learned = symbols[:end]
        self.held_out = symbols[end:].unfold(0, CONTEXT + 1, CONTEXT)[:32]

    def batch(self, step: int, rank: int) -> Tensor:
        """Sequences [BATCH, CONTEXT + 1] from anywhere; others at each step and for each rank."""
        generator = torch.Generator().manual_seed(step * 65536 + rank)
        starts = torch.randint(len(self._learned) - CONTEXT, (BATCH, 1), generator=generator)
        return self._learned[starts + torch.arange(CONTEXT + 1)]


def manual() -> bytes:
    """The reference of the language, half a megabyte."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def learning_rate(steps: int) -> Callable[[int], float]:
    """Rises for WARM_UP steps, then falls along a cosine."""
    return lambda step: LEARNING_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


class Report:
    """Prints the loss on text that the model has not seen, and in the end what the parameters have become."""

    def __init__(self, model: LanguageModel, text: Text, shown: bool) -> None:
        self._model, self._text, self._shown = model, text, shown
        self._start = time.monotonic()
        count = sum(parameter.numel() for parameter in model.parameters())
        self._say(f"{count / 1e6:.1f} million parameters")

    def before(self, step: int) -> None:
        if step % REPORT_EVERY == 0:
            self._say_loss(step)

    @torch.no_grad()
    def end(self, step: int) -> None:
        self._say_loss(step)
        digest = hashlib.sha256()
        for parameter in self._model.parameters():
            digest.update(parameter.numpy().data)
        self._say(f"parameters: sha256 {digest.hexdigest()[:16]}")

    @torch.no_grad()
    def _say_loss(self, step: int) -> None:
        if self._shown:
            loss = self._model.loss(self._text.held_out).item()
            self._say(f"step {step:4}  loss {loss:.4f}  {time.monotonic() - self._start:5.1f} s")

    def _say(self, words: str) -> None:
        if self._shown:
            print(words, flush=True)


def environment(master: str, token: str, rank: int, workers: int) -> dict[str, str]:
    """What a worker is told. torchrun sets RANK and WORLD_SIZE by itself."""
    job = {"COMPUTRON_PARAMETER_SERVICE": master, "COMPUTRON_JOB": "language-model", "COMPUTRON_JOB_TOKEN": token}
    return {**job, "RANK": str(rank), "WORLD_SIZE": str(workers)}


def launch(workers: int, aggregators: int) -> int:
    """The service and the workers, all on this machine. Returns the status of the first process that failed, else 0."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    master, token = f"http://127.0.0.1:{port}", secrets.token_hex()
    key = {"COMPUTRON_SERVICE_KEY": secrets.token_hex()}
    service = [sys.executable, "-m", "computron", "parameter-service"]
    quietly = ["--log-level", "error"]
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **variables: str) -> None:
        processes.append(subprocess.Popen(command, env={**os.environ, **variables}))

    with tempfile.TemporaryDirectory() as folder:
        try:
            log, common = f"{folder}/master.log", ["--snapshots", f"{folder}/snapshots", *quietly]
            start(*service, "master", "--external", "--port", str(port), "--log", log, *common, **key)
            for _ in range(aggregators):
                start(*service, "aggregator", "--master", master, *common, **key)
            for rank in range(workers):
                start(sys.executable, *sys.argv, **environment(master, token, rank, workers))
            while any(worker.poll() is None for worker in processes[-workers:]) and not any(
                p.poll() for p in processes
            ):
                time.sleep(0.1)
            return next((process.returncode for process in processes if process.returncode), 0)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


def positive(number: str) -> int:
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return int(number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=positive, default=2, help="how many train together (default: 2)")
    parser.add_argument("--aggregators", type=positive, default=1, help="that share the work (default: 1)")
    parser.add_argument("--steps", type=positive, default=300, help="how long (default: 300)")
    parser.add_argument("--text", type=Path, help="what to learn from (default: Python's manual)")
    parser.add_argument("--plain", action="store_true", help="without the Parameter Service, in one process")
    options = parser.parse_args()
    if options.text is not None and (not options.text.exists() or options.text.is_dir()):
        parser.error(f"--text: there is no file {options.text}")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a worker takes one core; and sums come in the same order everywhere
    if options.plain:
        train_plain(options)
    elif "RANK" in os.environ:
        train(options, int(os.environ["RANK"]))
    else:
        return launch(options.workers, options.aggregators)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
