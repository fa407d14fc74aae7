"""A study: a YAML file, its stages, and running them."""
