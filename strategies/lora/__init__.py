"""Strategies that know the two factors of LoRA."""
