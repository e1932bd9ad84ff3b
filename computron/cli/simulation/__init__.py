"""`computron simulate`: flags, what they mean, and the run."""
