"""The door: the only room of the server that knows protobuf and gRPC."""
