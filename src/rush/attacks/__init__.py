"""Attacks on differentiable functions of images, one pure function per module."""
