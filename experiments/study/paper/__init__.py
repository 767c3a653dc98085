"""The figures of the FusedKV paper (arXiv 2512.03870) from runs of our own, at a small size."""
