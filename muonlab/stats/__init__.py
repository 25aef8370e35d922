"""Paired tests, e-process, cost and verdict: arrays in, frozen results out. Imports no torch and does no I/O."""
