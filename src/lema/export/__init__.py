"""What leaves LEMA: a merged model, a PEFT adapter, a GGUF adapter, and the check of an adapter.

The room knows adapters' and models' files; it knows nothing of training.
"""
