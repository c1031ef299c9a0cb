"""Where images come from: folders, tables and known data sets."""
