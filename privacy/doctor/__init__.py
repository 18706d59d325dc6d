"""Whether what is executed is what is promised: checks over observations of the real training code."""
