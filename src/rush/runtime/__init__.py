"""Services for all other packages: execution, randomness, files, processes."""
