"""Noise that is correlated over rounds (DP-FTRL): one Gaussian mechanism for the whole run, whoever is asked when."""
