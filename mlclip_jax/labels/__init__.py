"""What is being recognised: label spaces, taxonomies and the catalogue."""
