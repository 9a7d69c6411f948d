"""The `mmforget` command: one module per command; the front door imports none of them."""
