"""From finished spans to the store, and from the store onwards."""
