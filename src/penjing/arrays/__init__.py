"""Pure mathematics on arrays, shared by methods and backends."""
