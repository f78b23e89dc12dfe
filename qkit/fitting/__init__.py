"""How codes are fitted: statistics of the inputs of a model's layers as files, and fitted codes of its weights."""
