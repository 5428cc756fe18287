"""Models in Hugging Face's format `nemotron_h`: in, out, and as one folder that holds a whole family.

The `transformers` package is not needed, and no code that comes with a model is ever run.
"""
