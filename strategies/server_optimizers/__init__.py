"""Server optimizers: the combined update as a pseudo-gradient."""
