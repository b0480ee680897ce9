"""Sizes, hardware and budgets to one `MemoryPlan`: what is kept where, decided before anything is allocated."""
