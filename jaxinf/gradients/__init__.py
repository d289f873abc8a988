"""Gradients of single examples, as layer matrices, and their compression."""
