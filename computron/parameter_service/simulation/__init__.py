"""Packing on a virtual clock: aggregators one by one, and traces of jobs that come and go."""
