"""What a model costs, and which tokens it puts together."""
