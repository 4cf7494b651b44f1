"""Where a medium's bytes are, a module for each kind of address; `source` holds the table of them."""
