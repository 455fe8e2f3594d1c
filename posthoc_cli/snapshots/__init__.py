"""Snapshot files: their format, reading and checking, durable writing, and the directory of a
run."""
