"""Other people's layouts: readers and writers of them, one module each."""
