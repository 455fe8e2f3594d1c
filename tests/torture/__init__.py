"""Experiments that hold the guarantees of snapshots and outputs: a share in the tests, all of it by `make torture`."""
