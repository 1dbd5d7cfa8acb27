"""Which modules a call means, and an error for each argument that does nothing."""
