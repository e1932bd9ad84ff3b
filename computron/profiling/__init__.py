"""Measures a live server over HTTP and writes what the simulator needs to know of it."""
