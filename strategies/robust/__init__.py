"""Robust aggregation: rules that hold when some sites send anything at all."""
