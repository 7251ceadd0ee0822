"""Runner for any transformers decoder, on CPU and CUDA. The only package that imports torch and transformers."""
