"""Who may come in: tenants, their tokens, and what a name means to them. Knows no gRPC."""
