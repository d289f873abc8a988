"""Attribution: scores of training examples for queries."""
