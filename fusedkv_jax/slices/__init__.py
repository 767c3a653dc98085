"""What a TPU slice that is not there would hold, compute and send: estimates from compiling."""
