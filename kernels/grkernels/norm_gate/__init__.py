"""SiLU, LayerNorm, gate and concatenation between HSTU's attention and its output projection."""
