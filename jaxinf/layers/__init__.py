"""Finds the layers of any network, and taps their inputs and output gradients."""
