"""Models, adapters, data, local training and evaluation; nothing here knows privacy or networks."""
