"""The exported ranking model as a TensorRT plan: built for a GPU that need not be there, executed where it is."""
