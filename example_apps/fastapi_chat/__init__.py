"""A FastAPI chat service that answers from a handful of documents."""
