"""Pictures of a model: what its parts look like, the lines of the picture, ``tree``."""
