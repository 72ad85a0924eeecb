"""Features of a frozen net, and the probes that are fitted to them."""
