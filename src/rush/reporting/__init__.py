"""Reports and comparisons, made from records alone; no torch."""
