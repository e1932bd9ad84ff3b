"""A program may end at any moment, with transfers under way and nothing closed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from computron import _transfer

library = {library!r}
backend = _transfer.cuda_backend(library=library) if library else _transfer.host_backend(link_latency=0.01)
frame = 1 << 16
pool = _transfer.DevicePool(backend, frame, 64)
memory = _transfer.HostMemory(backend, 64 * frame)
memory.commit(0, memory.nbytes)
engine = _transfer.TransferEngine(backend, pool, chunk_bytes=frame // 4)
addresses = _transfer.AddressRange(pool, 64 * frame)
frames = pool.allocate(64)
addresses.map(range(64), frames)
capsule = addresses.dlpack()
sources = [_transfer.Source.pinned(memory.address + page * frame) for page in range(64)]
transfer = engine.submit(frames, sources, [frame] * 64, [64])
{ending}
"""

ENDINGS = {
    "falls off its end": "",
    "raises": "raise SystemExit(0)",
    "keeps a cycle": "cycle = [engine, transfer, capsule]; cycle.append(cycle); del engine, pool, memory, backend",
    "waits in a thread": "import threading; threading.Thread(target=transfer.wait, daemon=True).start()",
    "closes the pool first": "pool.close(); memory.close(); del pool, memory, backend",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("backend", ["host", "standin"])
def test_a_program_ends_quietly_when_it(backend, ending, standin):
    library = str(standin.path) if backend == "standin" else None
    program = PROGRAM.format(library=library, ending=ENDINGS[ending])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
