"""Benchmarks: ratios of LEMA and PEFT measured side by side on this machine. `python -m benchmarks` lists them."""
