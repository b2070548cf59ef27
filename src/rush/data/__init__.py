"""Images: sources, checks, views and batches."""
