"""Trained classifiers for other software: an ONNX file, or a folder in the form of the Hugging Face hub."""
