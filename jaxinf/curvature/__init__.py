"""Curvature: K-FAC blocks for kfac-jax, the coverage contract, factors, and their eigenbasis."""
