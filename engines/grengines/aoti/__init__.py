"""The ranking model compiled ahead of time by AOTInductor: a package of machine code that runs without Python."""
