"""Checkpoints and averages that other programs wrote, as sources of a synthesis. Nothing in a file
is executed.

    pickles, containers         the tensors and values of a file, by its kind
    folders, content            what a checkpoint consists of; its tensors and values
    places, choose              what lies at a place; which of it is one run
    sets                        the weights and an average among them
    names, clock                the numbers in names; the times of files
    settings, updates           what an import adds to files; how an ordinary EMA was updated
    source, layouts             a checkpoint as a source; what programs write
    audit, audit_sample         the check of an average, by a sample of its elements
    audit_fit, audit_rules      the search for its length, and the rules that it may follow
    audit_breaks                files in exchanged places, and averages that began again
    decays                      the decays of averages: said in files, given, or found
    open_run                    the road from a place to the sources of a run
    import_run, manifest        the work of `ema import`, and its output
    describe                    what `ema info` says of checkpoints
    ask                         questions about what files leave open

A file is read once for its index; a synthesis then streams the bytes of its tensors, as it streams
snapshots.
"""

KINDS = ("ema", "checkpoints", "ema-pytorch", "posthoc-ema", "edm2")
"""The kinds of files: averages, weights, and averages whose names say their profile."""
