"""Chameleon's evaluation (MICRO 2025, arXiv 2411.17741) again, simulated: runs, their statistics, one function a figure."""
