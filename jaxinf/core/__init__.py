"""What everything is made of: types, random keys, examples, draws."""
