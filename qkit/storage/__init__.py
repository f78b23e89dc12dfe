"""Bytes and files: reads headers, streams tensors, and puts whole directories in place. Imports nothing about grids."""
