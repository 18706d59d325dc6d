"""Aggregation strategies: one algorithm per file, client half and server half together under its paper."""
