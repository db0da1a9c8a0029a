"""One module for each group of paths; each has a function that adds its routes to a router."""
