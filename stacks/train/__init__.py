"""Training steps: the specification, the float64 reference and the stacks that carry it out."""
