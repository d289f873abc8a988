"""The curvature of a model's loss: its kinds, their fits and eigenbases, and the exact GGN."""
