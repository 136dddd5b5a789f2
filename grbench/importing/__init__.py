"""`grbench import-weights`: checkpoints of other projects as weights and options of grbench."""
