"""What a run found, for people: a page (HTML), its figure (PNG), a cheap check of scores."""
