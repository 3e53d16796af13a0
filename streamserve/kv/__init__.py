"""Key/value caches: device operations (`cache`) and the host's ledger (`pages`)."""
