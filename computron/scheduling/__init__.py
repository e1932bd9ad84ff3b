"""Which model is swapped in, evicted and run when: a pure function of events and times. Standard library only."""
