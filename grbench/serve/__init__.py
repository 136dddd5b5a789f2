"""The server: strategies of a deployment behind the Open Inference Protocol, and the controller that chooses.

A request goes through `http` or `rpc`, which read it with `protocol`, to `controller`. The controller chooses one of
the `strategy` objects, whose batcher is that of measurements. docs/SERVING.md describes what clients see.
"""
