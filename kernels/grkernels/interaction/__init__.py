"""DLRM's feature interaction: the dot products of all pairs of a sample's features."""
