"""Folders of models: read, write, compare, save and convert."""
