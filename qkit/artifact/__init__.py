"""The portable directory: one model, its codes and its rules, in files that other tools open. Import its modules by name."""
