"""Readers of image files, archives and data sets."""
