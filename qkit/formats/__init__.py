"""Other programs' layouts, one tensor at a time: readers and writers, one module each."""
