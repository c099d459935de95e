"""Masked video distillation, trained fast. Importing this package is cheap; its parts are imported by name."""

__version__ = "0.1.0"
