"""Settings become objects: inputs, population, the plan of rounds or of a split run."""
