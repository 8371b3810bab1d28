"""Side-by-side measurements: each prints a ratio of two things timed in turns in one run."""
