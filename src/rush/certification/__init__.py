"""Certificates from votes, without torch except in certify, features and incremental, which draw the votes."""
