"""The pipeline engine: retrieve, then rank."""
