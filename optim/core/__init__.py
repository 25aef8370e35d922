"""The shared core of the optimizers: with its kind's own file, what decides how an optimizer computes."""
