"""The configuration of an experiment: YAML groups, composed by Hydra and validated by frozen pydantic models."""
