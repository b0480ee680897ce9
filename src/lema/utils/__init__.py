"""Conversion: other people's checkpoints into the one safetensors file or folder that LEMA reads best.

This room stands on core alone; it knows nothing of streaming, adapters or training.
"""
