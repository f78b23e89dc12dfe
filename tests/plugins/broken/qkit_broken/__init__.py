"""A plugin that cannot be imported."""

raise RuntimeError("its licence server is on fire")
