"""Benchmarks: how fast the parts are against named peers. No test; `make bench` runs them and exits 0.

    make bench                     every suite
    make bench ONLY=optim          one suite: optim or stats
    python -m benchmarks --only stats --out build/bench

A suite is a module with `run() -> list[Row]`. See `benchmarks.harness` for how a ratio is measured and what
the table says. Results, with the versions and the processor they were measured on, go to `build/bench/*.json`.
"""
