"""Finding the driver: none, too old, no device; and what is declared of it against the toolkit's header."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from computron import _transfer
from computron._transfer import TransferError

ROOT = Path(__file__).parents[2]
CUDA_HEADERS = [path for path in (Path("/usr/local/cuda/include"), Path("/usr/include")) if (path / "cuda.h").exists()]


def test_a_missing_driver_is_named():
    reason = _transfer.cuda_unavailable_reason("libno-such-driver.so.1")
    assert reason is not None
    assert reason.startswith("there is no CUDA driver: libno-such-driver.so.1: cannot open")
    with pytest.raises(TransferError, match="there is no CUDA driver"):
        _transfer.cuda_backend(library="libno-such-driver.so.1")


def test_a_library_that_is_no_driver_is_named():
    assert "does not tell its version" in str(_transfer.cuda_unavailable_reason("libm.so.6"))


def test_the_extension_imports_and_explains_without_a_driver():
    program = "from computron import _transfer; print(_transfer.cuda_unavailable_reason('libcuda-missing.so'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "there is no CUDA driver" in done.stdout, done.stderr


def test_the_extension_needs_no_library_of_cuda():
    needed = subprocess.run(["ldd", _transfer.__file__], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed
    assert "torch" not in needed


def test_a_usable_driver_has_no_reason(standin):
    assert _transfer.cuda_unavailable_reason(str(standin.path)) is None


def test_an_old_driver_is_named(standin, monkeypatch):
    monkeypatch.setenv("COMPUTRON_STANDIN_VERSION", "11080")
    reason = _transfer.cuda_unavailable_reason(str(standin.path))
    assert reason == ("the CUDA driver is too old: it supports CUDA 11.8, and 12.0 is needed; install a newer driver")


def test_a_driver_without_devices_is_named(standin, monkeypatch):
    monkeypatch.setenv("COMPUTRON_STANDIN_DEVICES", "0")
    assert _transfer.cuda_unavailable_reason(str(standin.path)) == "the CUDA driver (13.0) finds no device"


def test_a_device_without_virtual_memory_is_named(standin, monkeypatch):
    monkeypatch.setenv("COMPUTRON_STANDIN_VIRTUAL_MEMORY", "0")
    assert "has no virtual memory management" in str(_transfer.cuda_unavailable_reason(str(standin.path)))


def test_a_device_that_does_not_exist_is_an_error(standin):
    with pytest.raises(TransferError, match="CUDA_ERROR_INVALID_DEVICE"):
        _transfer.cuda_backend(7, library=str(standin.path))


@pytest.mark.skipif(not CUDA_HEADERS, reason="no cuda.h to compare with")
def test_what_is_declared_of_the_driver_agrees_with_its_header(tmp_path):
    compiler = shutil.which("g++")
    assert compiler
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{CUDA_HEADERS[0]}"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("driver_agreement.cpp"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_kernels(tmp_path):
    output = tmp_path / "kernels.fatbin"
    subprocess.run(
        ["nvcc", "-std=c++17", "-Werror=all-warnings", "-fatbin", "-arch=sm_90", "csrc/digest_kernel.cu", "-o", output],
        cwd=ROOT,
        check=True,
    )
    assert b"page_leaves" in output.read_bytes()
