"""The real scheduler on a virtual clock: hardware, workloads, traces, bounds, and what came of it."""
