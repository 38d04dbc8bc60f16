"""Each engine, on its real broker, with its real worker."""
