"""Local objectives: what a site adds to its noised gradients, and what the server makes of it."""
