"""Adapter folders of mlx-lm and of PEFT: read and write."""
