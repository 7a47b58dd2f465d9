"""The files of other tools: what their names mean, how they are read, how they are written."""
