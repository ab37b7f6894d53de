"""Timing one linear layer: the CPU backend's kernels and their peers, in one process, taking turns."""
