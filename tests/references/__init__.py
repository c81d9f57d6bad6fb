"""Methods in their most literal form, for tests to compare the package with."""
