"""Declared, paired, multi-seed comparisons of optimizers, with a verdict that may say "don't know"."""
