"""Layouts of other programs, one tensor at a time, and their configuration keys. No module here reads or writes a file."""
