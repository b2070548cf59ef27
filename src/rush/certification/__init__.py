"""Certificates from votes; no torch but in certify."""
