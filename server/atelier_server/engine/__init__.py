"""The desk, inside the worker: which step runs next. Knows no torch."""
