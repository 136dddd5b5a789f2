"""`python -m grbench kernels`: each operator checked, timed beside its variants, and compared with the roofline."""
