"""Certificates from votes, without torch except in certify, exact, features and incremental, which get the votes."""
