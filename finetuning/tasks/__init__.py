"""What each task asks of a network: a loss per example, and its metrics."""
