"""A server of grbench as an engine: `engine=remote engine.url=...` measures through the network."""
