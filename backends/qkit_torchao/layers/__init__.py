"""torch layers: prepared, learned, adapted and converted."""
