"""One site of a federation: the code that an organization runs beside its data."""
