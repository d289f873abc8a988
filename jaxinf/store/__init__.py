"""Training gradients kept on disk, which answer new queries."""
