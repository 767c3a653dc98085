"""What people run: binaries, and the configurations of experiments."""
