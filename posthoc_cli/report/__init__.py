"""A description of a run for people: its facts as texts, and an HTML page about it and its
sweeps."""
