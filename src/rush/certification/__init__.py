"""Certificates from votes; no torch but in certify, features and incremental, which draw them."""
