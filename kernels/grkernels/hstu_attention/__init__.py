"""HSTU attention: SiLU in the softmax's place, over jagged sequences with candidates at their end."""
