"""What Holdfast costs, beside what its peers cost, measured in one run."""
