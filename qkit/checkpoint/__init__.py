"""Checkpoints larger than memory: headers are read, tensors stream through, and a whole directory appears or none."""
