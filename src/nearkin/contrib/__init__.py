"""Models of others, read into nearkin's form."""
