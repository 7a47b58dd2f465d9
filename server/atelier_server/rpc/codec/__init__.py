"""Between protobuf and `core`: all validation of what comes over the wire, the last sight of protobuf."""
