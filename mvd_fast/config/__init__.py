"""The settings of a run: their schema, how they are loaded and checked, and what they mean."""
