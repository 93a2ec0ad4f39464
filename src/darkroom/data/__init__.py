"""Pictures in: sources, the one transform rule, batches, the latent cache, and the procedural set `shapes`."""
