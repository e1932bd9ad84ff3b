"""How many tokens a second does the generate executor give, without HTTP and without swaps?

Against transformers.generate on the same weights, dtype and threads, in turns, medians:
`generate.equal.ratio`: one batch of 8 prompts of equal length, all answers equally long.
`generate.mixed.ratio`: a queue of requests whose prompts and answers differ in length (answers: exponential). We admit
the next one as soon as a place of 8 is free; transformers takes them 8 at a time, padded, until the longest is done.
Only tokens that were asked for count.

Neither side looks for an end of the text: both give exactly the tokens that were asked for.

With --serve also `computron serve` against `transformers serve --continuous-batching` (`generate.serve.ratio`): each in
a process of its own with the same model, dtype and threads, asked over HTTP by the same client with 8 chats at once;
the one that is not being asked is stopped meanwhile. What transformers serve needs beside transformers is installed
into a folder of its own in the cache.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from _common import Report, arguments, uses_cuda
from _serve import Unavailable, computron_serve, transformers_serve
from transformers import AutoModelForCausalLM, PreTrainedModel

from computron.config import ModelConfig
from computron.execution.executor import make_executor, make_runner, run_step
from computron.execution.requests import GenerateJob, SamplingParams
from computron.models import LoadedModel, OpenGate, load_model, plan_model
from computron.models.demo import demo_models, shown_progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("generate.equal.ratio", "generate.mixed.ratio")
BATCH = 8
FRAME = 1 << 20
CACHE = 1 << 30
QUESTIONS = (
    "What is the capital of France?",
    "Explain in simple words why the sky is blue.",
    "Write a short poem about the sea.",
    "List five uses of a brick.",
    "How do I boil an egg?",
    "Tell me a story about a fox and a crow.",
    "What is the difference between a virus and a bacterium?",
    "Give me three tips for learning a language.",
)


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    answer: int


class Ours:
    def __init__(self, folder: str, dtype: str, device: torch.device) -> None:
        plan = plan_model(ModelConfig("model", folder, dtype=dtype, max_batch_size=BATCH))  # type: ignore[arg-type]
        image = torch.empty(plan.image.nbytes, dtype=torch.uint8)
        plan.image.read_into(0, memoryview(image.numpy()))
        self.model: LoadedModel = load_model(plan, image.to(device))
        cache = torch.empty(CACHE, dtype=torch.uint8, device=device)
        self.runner = make_runner(self.model, cache)
        self.executor = make_executor(self.model, FRAME, self.runner.block_bytes, self.runner.capacity)
        self.executor.set_cache(CACHE // FRAME)

    def run(self, requests: Sequence[Request]) -> int:
        """Tokens given; the next request is admitted when one has ended."""
        for number, request in enumerate(requests):
            sampling = SamplingParams(request.answer, temperature=0.0, ignore_eos=True)
            self.executor.add(number, GenerateJob(request.prompt, sampling))
        waiting, running, tokens = list(range(len(requests))), list[int](), 0
        while waiting or running:
            while waiting and len(running) < BATCH:
                running.append(waiting.pop(0))
            result = run_step(self.executor, self.runner, running, OpenGate())
            tokens += len(result.outputs)
            running = [number for number in running if number not in result.finished]
        return tokens


class Transformers:
    def __init__(self, folder: str, dtype: str, device: torch.device) -> None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.eval().to(device)
        self.device = device

    def run(self, requests: Sequence[Request]) -> int:
        """Tokens asked for; batch after batch."""
        for start in range(0, len(requests), BATCH):
            batch = requests[start : start + BATCH]
            width, longest = max(len(r.prompt) for r in batch), max(r.answer for r in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
                mask[row, width - len(request.prompt) :] = 1
            answers = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                do_sample=False,
                max_new_tokens=longest,
                eos_token_id=None,  # not min_new_tokens, which would add work to every step
                pad_token_id=0,
            )
            assert answers.shape[1] == width + longest, "transformers ended before the longest answer"
        return sum(request.answer for request in requests)


def equal_requests(generator: random.Random, vocabulary: int, answer: int) -> list[Request]:
    return [Request(_prompt(generator, vocabulary, 64), answer) for _ in range(BATCH)]


def mixed_requests(generator: random.Random, vocabulary: int, count: int, mean: int) -> list[Request]:
    """Prompts of 16 to 192 tokens; answers of `mean` tokens on average, at most five times as many."""
    answers = [min(5 * mean, max(4, round(generator.expovariate(1 / mean)))) for _ in range(count)]
    return [Request(_prompt(generator, vocabulary, generator.randint(16, 192)), answer) for answer in answers]


def _prompt(generator: random.Random, vocabulary: int, length: int) -> tuple[int, ...]:
    return tuple(generator.randrange(10, vocabulary) for _ in range(length))


def tokens_per_second(
    runs: dict[str, Callable[[], int]], repetitions: int, device: torch.device, *, warm: bool = False
) -> dict[str, float]:
    """The median of each; they take turns, after one run each to warm up unless they are `warm`."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(1 if warm else 0, repetitions + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            tokens = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repetition:
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in rates.items()}


def compare_in_process(
    folder: str, options: argparse.Namespace, repetitions: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Tokens a second of the executor and of transformers.generate, by workload. Leaves no model in memory."""
    ours, theirs = Ours(folder, options.dtype, device), Transformers(folder, options.dtype, device)
    generator = random.Random(options.seed)
    vocabulary = ours.model.plan.vocabulary
    equal = equal_requests(generator, vocabulary, 32 if options.quick else 64)
    mixed = mixed_requests(generator, vocabulary, *((32, 16) if options.quick else (64, 48)))
    rates = {}
    for name, requests, times in (("equal", equal, repetitions), ("mixed", mixed, max(1, repetitions // 2))):
        runs = {"executor": lambda r=requests: ours.run(r), "transformers.generate": lambda r=requests: theirs.run(r)}
        rates[name] = tokens_per_second(runs, times, device, warm=name == "mixed")
    return rates


def compare_servers(folder: str, dtype: str, repetitions: int, device: torch.device) -> dict[str, float]:
    """Tokens a second over HTTP. Raises Unavailable."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with (
        transformers_serve(folder, dtype=dtype, device=device.type) as theirs,
        computron_serve(folder, dtype=dtype, device=device.type, batch=BATCH) as ours,
    ):
        runs = {
            "computron serve": lambda: ours.ask(chats, max_tokens=64),
            "transformers serve": lambda: theirs.ask(chats, max_tokens=64),
        }
        return tokens_per_second(runs, repetitions, device)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--serve", action="store_true", help="also run transformers serve --continuous-batching")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="of torch; default: 2")
    parser.add_argument("--model", help="a checkpoint folder; default: SmolLM2-135M-Instruct")


def main() -> None:
    options = arguments(__doc__ or "", flags)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if uses_cuda(options) else "cpu")
    folder = options.model
    if folder is None:
        with shown_progress() as progress:
            folder = str(demo_models(progress).smollm2)
    repetitions = 2 if options.quick else 5
    report = Report(f"generate, {options.dtype}, {options.threads} threads, batch {BATCH}", options, NAMES)
    rates = compare_in_process(folder, options, repetitions, device)
    if options.serve:
        try:
            rates["serve"] = compare_servers(folder, options.dtype, repetitions, device)
        except Unavailable as reason:
            print(f"--serve was skipped: {reason}")
    for name, each in rates.items():
        (mine, value), (theirs_label, baseline) = each.items()
        report.row(f"generate.{name}.ratio", value, "tokens/s", baseline, value / baseline)
        print(f"generate.{name}: {mine} against {theirs_label}")
    report.plot(lambda axes: draw(axes, rates))
    report.finish()


def draw(axes: Axes, rates: dict[str, dict[str, float]]) -> None:
    for offset, label in enumerate(("Computron", "transformers")):
        places = [index + 0.4 * offset for index in range(len(rates))]
        axes.bar(places, [list(each.values())[offset] for each in rates.values()], width=0.38, label=label)
    axes.set_xticks(
        [index + 0.2 for index in range(len(rates))],
        [f"{name}\n{' | '.join(each)}" for name, each in rates.items()],
        fontsize="small",
    )
    axes.set_ylabel("tokens/s")
    axes.legend()


if __name__ == "__main__":
    main()
