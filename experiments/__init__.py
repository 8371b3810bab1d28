"""Comparisons that need training runs: not part of the program, but of what it claims."""
