"""The tests, a folder for each package; helpers are imported as `tests.<folder>.<file>`."""
