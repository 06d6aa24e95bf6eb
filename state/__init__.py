"""State of one partition: slab, store, changelog, and the commit that ties them. No Faust, no torch."""
