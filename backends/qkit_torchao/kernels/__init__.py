"""Compiled code for torch, and the choice between it and the plain arithmetic."""
