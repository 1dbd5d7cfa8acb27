"""Figures and pictures: measures, the report of a swap, the tree of a model."""
