"""What every room needs: execution, randomness, files, processes."""
