"""Studies: a grid of training runs, claimed by any number of workers, and what follows from it."""
