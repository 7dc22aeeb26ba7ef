"""Framework adapters: each puts the core where one framework keeps its routes."""
