"""What lies between HSTU's attention and its output projection: SiLU, LayerNorm, gate and concatenation in one."""
