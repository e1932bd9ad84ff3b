"""Builds the extension `computron._transfer` from csrc/.

Only a C++17 compiler is needed. If nvcc is found, it compiles the device kernels, which are embedded as bytes and
loaded through the driver at run time: the result needs neither CUDA's headers nor its libraries.

COMPUTRON_SANITIZE=address|thread builds with that sanitizer; COMPUTRON_NVCC=path names nvcc ("" turns it off).
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pybind11
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fatbin", "-lineinfo"]
DEVICE_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


def build_folder() -> Path:
    sanitizer = os.environ.get("COMPUTRON_SANITIZE", "")
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}" + (f"-{sanitizer}" if sanitizer else "")
    return ROOT / "build" / f"extension-{tag}"


@contextmanager
def only_build() -> Iterator[Path]:
    """The build folder, in which no other process builds meanwhile."""
    build = build_folder()
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield build


def sanitizer_flags() -> list[str]:
    sanitizer = os.environ.get("COMPUTRON_SANITIZE", "")
    return (
        [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-O1", "-g1", "-Wno-maybe-uninitialized"]
        if sanitizer
        else []
    )


def make(output: Path, command: list[str], inputs: list[Path]) -> None:
    """Run `command`, unless it made `output` before from inputs that have not changed since."""
    # pip's isolated builds put pybind11 somewhere else each time: its version counts, not its place.
    recipe = shlex.join(command).replace(pybind11.get_include(), f"pybind11 {pybind11.__version__}")
    kept = output.with_suffix(output.suffix + ".recipe")
    if output.exists() and kept.exists() and kept.read_text() == recipe:
        made = output.stat().st_mtime_ns
        if all(path.exists() and path.stat().st_mtime_ns <= made for path in inputs):
            return
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {output.relative_to(ROOT)}", flush=True)
    start = time.time_ns()
    subprocess.run(command, check=True, cwd=ROOT)
    os.utime(output, ns=(start, start))  # what changes during the command is newer
    kept.write_text(recipe)


def compile_source(source: Path, output: Path, flags: list[str]) -> Path:
    """Compile one file, unless neither it nor a header that it includes has changed."""
    depends = output.with_suffix(".d")
    listed = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split() if depends.exists() else []
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *flags, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(output)]
    make(output, command, [source, *(ROOT / path for path in listed)])
    return output


def find_nvcc() -> str | None:
    named = os.environ.get("COMPUTRON_NVCC")
    if named is not None:
        return named or None
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def supported_architectures(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [name for name in DEVICE_ARCHITECTURES if f"sm_{name}" in listed]


def embed_kernels(build: Path) -> Path:
    """A C++ file with the compiled device kernels in it, or with none where there is no nvcc."""
    kernels, embedded = build / "kernels.fatbin", build / "kernels.cpp"
    nvcc = find_nvcc()
    image = b""
    if nvcc is not None:
        architectures = supported_architectures(nvcc)
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        newest = architectures[-1]
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        source = ROOT / "csrc" / "digest_kernel.cu"
        command = [nvcc, *NVCC_FLAGS, *targets, str(source), "-o", str(kernels)]
        make(kernels, command, [source, ROOT / "csrc" / "xxh64.hpp"])
        image = kernels.read_bytes()
    values = ",".join(map(str, image)) or "0"
    text = (
        '#include "kernels.hpp"\n\n'
        f"namespace computron {{\nalignas(16) const unsigned char kKernels[] = {{{values}}};\n"
        f"const size_t kKernelBytes = {len(image)};\n}}\n"
    )
    if not embedded.exists() or embedded.read_text() != text:
        build.mkdir(parents=True, exist_ok=True)
        embedded.write_text(text)
    return embedded


def compile_and_link(sources: list[Path], target: Path, includes: list[str]) -> None:
    """Compile what has changed, in parallel, and link it to a shared library."""
    build = build_folder() / target.name.split(".")[0]
    flags = [*FLAGS, *sanitizer_flags(), *includes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: compile_source(path, build / f"{path.stem}.o", flags), sources))
    built = build / target.name
    link = [*shlex.split(os.environ.get("CXX", "g++")), "-shared", "-pthread", *sanitizer_flags()]
    make(built, [*link, *map(str, objects), "-ldl", "-o", str(built)], objects)
    if not target.exists() or target.read_bytes() != built.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file in its place: a process that has loaded the old one keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        fresh.replace(target)


class BuildExtension(build_ext):
    """Compiles in parallel, and only what has changed, also in a temporary build of pip's."""

    def build_extension(self, ext: Extension) -> None:
        includes = [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}"]
        includes.append(f"-isystem{sysconfig.get_path('include')}")
        with only_build() as build:
            sources = [*(ROOT / path for path in ext.sources), embed_kernels(build)]
            compile_and_link(sources, Path(self.get_ext_fullpath(ext.name)), includes)


class BuildStandin(Command):
    """Builds the stand-in for the CUDA driver that tests load, and prints its path."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        sources = [*sorted((ROOT / "csrc" / "standin").glob("*.cpp")), ROOT / "csrc" / "digest.cpp"]
        with only_build() as build:
            target = build / "libcomputron_standin.so"
            compile_and_link(sources, target, [])
        print(target)


setup(
    ext_modules=[
        Extension("computron._transfer", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")))
    ],
    cmdclass={"build_ext": BuildExtension, "build_standin": BuildStandin},
)
