"""The baseline engine: a naive generate loop with Hugging Face transformers."""
