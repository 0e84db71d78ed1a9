"""Benchmarks: what is measured, against whom, and how. See docs/benchmarks.md."""
