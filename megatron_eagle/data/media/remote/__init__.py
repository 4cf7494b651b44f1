"""Media on object stores and web servers: fetched once into a bounded cache, and read from there as files."""
