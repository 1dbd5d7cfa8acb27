"""Text to patterns, and patterns to text; nothing here knows MLX."""
