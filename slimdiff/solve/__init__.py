"""One closed form a file, from moments and weights to a `Solution` that serves every width."""
