"""Ahead-of-time compilation for TPU slices: what each device would hold, compute and send."""
