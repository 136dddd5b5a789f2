"""Helpers of several test files: oracles, requests, checks."""
