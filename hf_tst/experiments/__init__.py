"""Comparisons of many runs: arms, budgets, a queue of processes, and their report."""
