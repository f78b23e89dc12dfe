"""Bytes and files: headers are read, tensors stream through, and a whole directory appears or none. Knows no grid."""
