"""What tracing costs: measured against the bare application and against every peer, in one run."""
