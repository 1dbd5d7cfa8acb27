"""Draw a model: what its modules look like, the lines of the picture, and ``tree``."""
