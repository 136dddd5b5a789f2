"""Quality of recommendations: protocols, metrics with intervals, baselines, and `grbench evaluate`."""
