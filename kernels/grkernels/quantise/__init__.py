"""Rows in e4m3, each with a scale: operands of products that no norm has written so."""
