"""What MLX holds where: containers, the walk through a model, what is shared."""
