"""Stored targets: the teachers run once over a few replayable views of every clip; training then only reads.

`store` is the format, its reader and its writer; `build` is the command `mvd-fast teachers cache`.
"""
