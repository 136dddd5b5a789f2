"""Parts that every engine shares: batches, CUDA graphs, results, timing, devices, files."""
