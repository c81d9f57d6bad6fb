"""Sources, protocols, transforms and input pipelines."""
