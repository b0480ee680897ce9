"""What leaves LEMA: a merged model, a PEFT adapter, a GGUF adapter, and the check of an adapter.

Files in, files out: a run need not be at hand.
"""
