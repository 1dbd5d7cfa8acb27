"""Modules that represent a layer: ``Wrapper``, and those of ``observe``, ``capture``, ``patch``."""
