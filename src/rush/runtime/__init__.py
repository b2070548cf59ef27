"""Services for all rooms: execution, randomness, files, processes."""
