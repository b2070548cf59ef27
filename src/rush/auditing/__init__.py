"""The audit: does an evaluation overestimate robustness?"""
