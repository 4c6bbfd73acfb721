"""The engine of a round, in plain torch: quorum, update, exchange, outer step, commit. No Lightning."""
