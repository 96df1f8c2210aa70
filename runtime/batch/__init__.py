"""Batch files: lines of requests in, a line for each answer out, resumed where they were left."""
