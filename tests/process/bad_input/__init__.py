"""Bad input at a real server: the right status, everything that is wrong at once, and the next call works."""
