"""Reports and comparisons, made from records alone, without torch."""
