"""Elastic federation of separate jobs: quorum, commit, failure detection."""
