"""The workers that keep state, `fold` and `samples`: Faust owns their partitions, and is kept in check here. Nobody else knows Faust."""
