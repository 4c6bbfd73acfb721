"""Federation of parties that are launched together: a store and Gloo."""
