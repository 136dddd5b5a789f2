"""The exported ranking model as a TensorRT plan, which can be built on a machine without the GPU."""
