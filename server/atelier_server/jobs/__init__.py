"""The book: durable jobs, their events, admission and dispatch."""
