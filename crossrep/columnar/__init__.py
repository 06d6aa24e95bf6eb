"""Rows, their algebra, and how they are encoded as frames and records: all in columns, without Kafka and pyarrow."""
