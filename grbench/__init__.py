"""grbench: experiments and benchmarks for generative-recommender inference."""

__version__ = "0.1.0"
