"""Where separate jobs meet: the process that keeps their words, and its clients."""
