"""Worker processes: the device side of the house, and the front's handle on it."""
