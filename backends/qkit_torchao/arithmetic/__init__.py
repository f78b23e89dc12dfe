"""The law in torch, function by function: arrays only."""
