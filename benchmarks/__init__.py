"""Side-by-side measurements; every number in the documentation comes from a file written here."""
