"""The seam between qkit and its engines: the protocols, the registry, and the NumPy engine."""
