"""Synthetic clinics: the public text of the embedded base and the private records of four fictional sites."""
