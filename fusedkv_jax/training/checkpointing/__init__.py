"""Checkpoints of a run: written whole or not at all, verified, and restored on any mesh."""
