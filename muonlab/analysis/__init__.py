"""Answers from results at hand, without a run: compare, power, calibrate. Tables in, frozen answers out."""
