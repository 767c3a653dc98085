"""Suites of `experiments.evaluate`: what is measured, and its report."""
