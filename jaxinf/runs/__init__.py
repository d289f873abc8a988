"""Runs: a config, a folder, and the stages between them."""
