"""Benchmark rows: cases, processes, results, reports."""
