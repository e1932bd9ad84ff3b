"""A process that sums up gradients of many jobs and applies their optimizers."""
