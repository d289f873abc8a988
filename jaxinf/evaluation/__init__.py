"""What scores and curvatures are worth: studies against an exact or retrained reference."""
