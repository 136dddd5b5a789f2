"""HSTU inside vLLM: the model, its attention backend, and the engine. No vLLM import here."""
