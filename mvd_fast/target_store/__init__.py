"""Targets that are computed once: over a few replayable views of every clip; training then only reads.

`store` is the format, its reader and its writer; `build` and `command` are `mvd-fast teachers cache`.
"""
