"""Blind relay: two parties of which neither can be dialed meet there, encrypted from end to end."""
