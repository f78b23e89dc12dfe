"""Values that were computed from arrays, cached until the arrays change."""
