"""Its place puts this folder on the path, so that tests below find `raw_folders`."""
