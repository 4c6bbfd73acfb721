"""Compressed exchanges: codecs, their collectives, and the exchanges as users configure them."""
