"""Targets that are there before the student's step.

Stored targets: the teachers run once over a few replayable views of every clip; training then only reads. `store` is
the format, its reader and its writer; `build` is the command `mvd-fast teachers cache`. `ahead`: the next batch's
teachers beside the student.
"""
